"""An HTTP server for one bundle: it listens, opens the bundle, serves until it is asked to end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.serve.http.app import Options
    from semkv_deploy.serve.scheduler import Scheduler

DRAIN_SECONDS = 30
"""How long replies that run may go on once the server is asked to end."""


def require_http() -> None:
    """Fails where the packages of the extra `serve` are missing.

    Raises:
        SemkvError: naming the one.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        fix = "install it with: pip install 'semkv-deploy[serve]'"
        raise SemkvError(f"{error.name} is not installed", where="serve", fix=fix) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; 0: on a free port.

    Raises:
        SemkvError: when the address is not this machine's, or taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise SemkvError(
            f"cannot listen: {reason}", where=f"{host}:{port}", fix="give another --host or --port"
        ) from None
    return listener


def url(listener: socket.socket) -> str:
    """Where a listener is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a listener."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def run(scheduler: Scheduler, options: Options, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM: then replies that run may end, and sessions are saved where that was asked for.

    Args:
        ready: called when requests are taken.
    """
    import uvicorn

    from semkv_deploy.serve.http.app import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready()

    config = uvicorn.Config(
        create_app(scheduler, options),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    scheduler.start()
    try:
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        # uvicorn sends itself the signal again that it has ended for.
        pass
    finally:
        scheduler.close()

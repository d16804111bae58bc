"""A server in a thread of this process, on a free port, over four rows of the tiny bundle."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pytest

from semkv_deploy.serve.http.run import listen, url
from semkv_deploy.serve.scheduler import Scheduler

from ..schedulers import Parts, scheduler

KEY = "sesame"


class Served(NamedTuple):
    url: str
    scheduler: Scheduler

    def client(self, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60, **options})

    def post(self, path: str, **options: Any) -> Any:
        import httpx

        headers = {"authorization": f"Bearer {KEY}", **options.pop("headers", {})}
        return httpx.post(f"{self.url}{path}", headers=headers, timeout=60, **options)

    def get(self, path: str, key: str = KEY) -> Any:
        import httpx

        return httpx.get(f"{self.url}{path}", headers={"authorization": f"Bearer {key}"}, timeout=60)


@contextmanager
def serving(schedule: Scheduler, **options: Any) -> Iterator[Served]:
    import uvicorn

    from semkv_deploy.serve.http.app import Options, create_app

    app = create_app(schedule, Options(name="tiny", api_key=KEY, **options))
    config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=5)
    with closing(listen("127.0.0.1", 0)) as listener:
        server, address = uvicorn.Server(config), url(listener)
        schedule.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=20):
            yield Served(address, schedule)
        server.should_exit = True
        thread.join(20)
        schedule.close()


@pytest.fixture(scope="module")
def served(parts: Parts) -> Iterator[Served]:
    with serving(scheduler(parts, on_full="forget", wait_seconds=60.0, max_new_tokens=300), max_body=20_000) as server:
        yield server

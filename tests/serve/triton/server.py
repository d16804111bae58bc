"""A Triton server from .triton, in a process group of its own; see scripts/triton.sh."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[3]
INSTALLED = ROOT / ".triton"
SERVER = INSTALLED / "pytriton" / "tritonserver"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def absent() -> str | None:
    """Why no server runs here; None: one does."""
    if not (SERVER / "bin" / "tritonserver").is_file():
        return "no Triton server: scripts/triton.sh installs one"
    if not (SERVER / "python_backend_stubs" / VERSION).is_dir():
        return f"the Triton server has no Python backend for Python {VERSION}"
    try:
        ctypes.CDLL(f"libpython{VERSION}.so.1.0")
    except OSError:
        return f"the Triton server's Python backend needs the system's libpython{VERSION}.so.1.0"
    return None if Path(f"/usr/lib/python{VERSION}/os.py").is_file() else f"no Python {VERSION} of the system"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Server:
    """Starts with some models of a repository.

    Args:
        folder: for the backend and logs.
        native: libtriton_semkv.so, in place of the Python backend.
        both: with `native`, the Python backend as well.
        environment: of the server, added to what it has.
    """

    def __init__(
        self,
        repository: Path,
        folder: Path,
        models: list[str],
        *,
        native: Path | None = None,
        both: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._repository, self._folder, self._models = repository, folder, models
        self._added = environment or {}
        python, semkv = folder / "backends" / "python", folder / "backends" / "semkv"
        if native is not None:
            semkv.mkdir(parents=True, exist_ok=True)
            shutil.copy(native, semkv)
        if (native is None or both) and not python.exists():
            shutil.copytree(SERVER / "backends" / "python", python)
            shutil.copy(SERVER / "python_backend_stubs" / VERSION / "triton_python_backend_stub", python)
        self.http, self.grpc, self.metrics = free_port(), free_port(), free_port()
        self.url, self.log = f"http://127.0.0.1:{self.http}", folder / "log.txt"
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command(), env=self._environment(), stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 120
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(self.log.read_text(errors="replace")[-4000:])
            time.sleep(0.2)

    def _command(self) -> list[str]:
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        return [
            str(SERVER / "bin" / "tritonserver"),
            f"--model-repository={self._repository}",
            f"--backend-directory={self._folder / 'backends'}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            *(f"--load-model={model}" for model in self._models),
            *(f"--{name}-address=127.0.0.1" for name in ports),
            *(f"--{name}-port={port}" for name, port in ports.items()),
        ]

    def _environment(self) -> dict[str, str]:
        packages = [str(INSTALLED), str(ROOT), *site.getsitepackages()]
        return {
            # The backend is Python of the system, and finds its library beside the first python3 of the path.
            "PATH": "/usr/bin:/bin",
            "LD_LIBRARY_PATH": str(INSTALLED / "nvidia_pytriton.libs"),
            "PYTHONPATH": os.pathsep.join(packages),
            "OMP_NUM_THREADS": "1",
            "HOME": str(self._folder),
            **self._added,
        }

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def terminate(self) -> None:
        """Asks the server to end, and waits until it has."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends the server, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def metric(self, name: str, model: str = "chat") -> float:
        """One number of a model's."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics}/metrics", timeout=20).text
        lines = [line for line in text.splitlines() if line.startswith(f'{name}{{model="{model}"')]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0

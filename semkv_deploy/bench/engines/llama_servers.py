"""Two ways to llama.cpp's server: the package xllamacpp, inside this process, and a program `llama-server`, which is
compiled for the processor it was built on. Both speak the same HTTP."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from semkv_deploy.errors import SemkvError

_PR_SET_PDEATHSIG = 1
_LOADING_S = 600
"""The longest that a program may take to load its model."""


@dataclass(frozen=True)
class ServerOptions:
    """What a server is started with.

    Attributes:
        path: the GGUF file.
        cache: type of keys and values, as llama.cpp calls it.
        slots: rows.
        context: positions of all rows together; the server deals them out.
    """

    path: str
    cache: str
    slots: int
    context: int
    threads: int


class Server(ABC):
    """A llama.cpp server with flash attention, that keeps nothing beside its slots.

    Attributes:
        address: `http://host:port`.
        pid: of its process; None: this one.
    """

    address: str
    pid: int | None = None

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Its version, and the instruction sets that it was compiled for."""

    @abstractmethod
    def close(self) -> None:
        """Ends it."""


class PackagedServer(Server):
    """xllamacpp's."""

    def __init__(self, options: ServerOptions) -> None:
        import xllamacpp

        self._api = xllamacpp
        parameters = xllamacpp.CommonParams()
        parameters.model.path = options.path
        parameters.n_parallel, parameters.n_ctx = options.slots, options.context
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.cache.upper()}")
        parameters.cache_type_k = parameters.cache_type_v = kind
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.n_gpu_layers = 0
        # Its model and context are the ones asked for, whatever the machine has.
        parameters.fit_params, parameters.cache_ram_mib, parameters.n_ctx_checkpoints = False, 0, 0
        # Errors only; no pages of its own for a browser.
        parameters.verbosity, parameters.ui = 0, False
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise _does_not_load(options, str(error)) from None
        self.address = self._server.listening_address

    def about(self) -> dict[str, str]:
        return {"xllamacpp": self._api.__version__, "llama.cpp": self._api.get_system_info().strip(" |")}

    def close(self) -> None:
        del self._server


class ProgramServer(Server):
    """A program's, in a process below this one."""

    def __init__(self, program: Path, options: ServerOptions) -> None:
        self._program = program
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [
            str(program), "--model", options.path, "--host", "127.0.0.1", "--port", str(port),
            "--parallel", str(options.slots), "--ctx-size", str(options.context),
            "--threads", str(options.threads), "--threads-batch", str(options.threads),
            "--cache-type-k", options.cache, "--cache-type-v", options.cache, "--flash-attn", "on",
            "--gpu-layers", "0", "--fit", "off", "--cache-ram", "0", "--ctx-checkpoints", "0", "--no-ui",
            "--verbosity", "1",
        ]  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `close`
        # Standard input has this process's requests.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, preexec_fn=_end_with_parent
        )
        self.pid = self._process.pid
        self._wait(options)

    def about(self) -> dict[str, str]:
        version = re.search(r"version: (.*)", self._run("--version"))
        # It tells its instruction sets to who asks for many words, which would be written at every step as well.
        sets = re.search(r"system_info:.*?\| (CPU : .*)", self._run("--verbosity", "4", "--model", os.devnull))
        return {
            "llama-server": version[1] if version else "version unknown",
            "llama.cpp": sets[1].strip(" |") if sets else "instruction sets unknown",
        }

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _run(self, *arguments: str) -> str:
        """What the program says before it ends."""
        done = subprocess.run([self._program, *arguments], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def _wait(self, options: ServerOptions) -> None:
        limit = time.monotonic() + _LOADING_S
        while time.monotonic() < limit:
            if self._process.poll() is not None:
                words = self._said().strip().splitlines()
                self._log.close()
                raise _does_not_load(options, "; ".join(words[-3:]) or f"it ended with code {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.address}/health"):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        self.close()
        raise _does_not_load(options, f"it was not ready after {_LOADING_S} s")

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()


def _end_with_parent() -> None:
    """Has the kernel end this process when its parent does (Linux): workers are killed, and would leave it behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def check_program(program: Path, option: str) -> None:
    """Fails unless it can be run.

    Raises:
        SemkvError: with what to build.
    """
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise SemkvError(
            "not a program", where=f"{option} {program}", expected="llama.cpp's llama-server",
            fix="build it: scripts/llama_server.sh",
        )  # fmt: skip


def _does_not_load(options: ServerOptions, why: str) -> SemkvError:
    return SemkvError(
        f"llama.cpp does not load it: {why.rstrip('.')}", where=f"--llama-cpp {options.path}, {options.cache} cache"
    )

"""Builds one engine from one ONNX file, in a child process: TensorRT aborts where others raise, and never frees all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import external_tensors, read_graph
from semkv_deploy.targets.tensorrt import engine_cache
from semkv_deploy.targets.tensorrt.api import (
    TITLES,
    Runtime,
    check_compute_capabilities,
    default_compute_capabilities,
    installed_version,
    library_environment,
    missing,
)
from semkv_deploy.targets.tensorrt.request import EngineRequest, EngineResult

if TYPE_CHECKING:
    pass

Progress = Callable[[str, float | None], None]

_LOG_LINES = 5
"""Last lines of the child's log that the message of a crash has."""


def build_engine(request: EngineRequest, progress: Progress = lambda what, share: None) -> EngineResult:
    """Parses, proves, builds and writes one engine.

    Args:
        progress: called with what is being done, and the share of it that is done (None: unknown).

    Raises:
        SemkvError: for a graph, option or machine from which no such engine can be built, a network that is not what
            was promised, or a builder that crashed. No plan is left then.
    """
    if gap := missing(request.runtime):
        raise SemkvError("not available on this machine", where=f"--target {request.runtime}", fix=gap)
    check_compute_capabilities(request.compute_capabilities, request.runtime)
    capabilities = sorted(set(request.compute_capabilities)) or default_compute_capabilities(request.runtime)
    request = request.model_copy(update={"compute_capabilities": capabilities})
    library = request.plugin_library
    if library is not None and not library.is_file():
        raise SemkvError("no such file", where=f"--plugin-library {library}", fix="build it: scripts/build_plugins.sh")
    if request.embed_plugins and library is None:
        raise SemkvError("no library to embed", where="--embed-plugins", fix="give --plugin-library")
    external = external_files(request.onnx)
    version = installed_version(request.runtime)
    assert version is not None
    with _beside(request.plan) as partial:
        folder, key = request.engine_cache, ""
        if folder is not None:
            progress("looking for the engine in the cache", None)
            key = engine_cache.cache_key(engine_cache.key_parts(request, version, external))
            if (found := engine_cache.look_up(folder, key, partial)) is not None:
                os.replace(partial, request.plan)
                return found
        result = run_worker(request.model_copy(update={"plan": partial}), progress)
        if folder is not None:
            try:
                engine_cache.store(folder, key, partial, result)
            except OSError as error:
                note = f"the engine was not kept in the cache {folder}: {error.strerror}"
                result.warnings.append(note)
        os.replace(partial, request.plan)
    return result


def external_files(graph: Path) -> list[Path]:
    """Files of weights that an ONNX file refers to, each once.

    Raises:
        SemkvError: when the graph or such a file is missing, truncated or not what it should be.
    """
    model = read_graph(graph, expected="an ONNX graph", fix="lower the graph again")
    needed: dict[str, int] = {}
    for tensor in external_tensors(model):
        end = tensor.offset + (tensor.length or 0)
        needed[tensor.location] = max(end, needed.get(tensor.location, 0))
    for name, size in needed.items():
        data = graph.parent / name
        if not data.is_file():
            raise SemkvError(
                f"external data of {graph.name} is missing", where=data, fix=f"put it beside {graph.name} again"
            )
        if data.stat().st_size < size:
            raise SemkvError(
                f"external data of {graph.name} is truncated",
                where=data,
                expected=f"at least {size} bytes",
                got=f"{data.stat().st_size} bytes",
                fix="copy the file again",
            )
    return [graph.parent / name for name in sorted(needed)]


def list_creators(runtime: Runtime, library: Path) -> list[str]:
    """Plugin creators, "namespace::name version", that a library registers.

    Raises:
        SemkvError: when the library does not load.
    """
    events = _Child(
        runtime, {"task": "creators", "runtime": runtime, "library": str(library)}, lambda what, share: None
    )
    return list(events.run()["creators"])


def run_worker(request: EngineRequest, progress: Progress) -> EngineResult:
    """Builds in a child process, without cache and at `request.plan` itself.

    Raises:
        SemkvError: what the child says, or how it died.
    """
    task = {"task": "build", "request": request.model_dump(mode="json")}
    return EngineResult.model_validate(_Child(request.runtime, task, progress).run())


class _Child:
    """One run of `worker`: a JSON object goes in, events come out, one a line."""

    def __init__(self, runtime: Runtime, task: dict[str, Any], progress: Progress) -> None:
        self.runtime, self.task, self.progress = runtime, task, progress
        self.log: list[str] = []
        self.answer: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "semkv_deploy.targets.tensorrt.worker"]
        with library_environment(self.runtime) as environment, tempfile.TemporaryFile() as stderr:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment
            )
            assert child.stdin is not None and child.stdout is not None
            try:
                # A child that is dead already says why on standard error.
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(json.dumps(self.task).encode())
                for line in child.stdout:
                    self._event(json.loads(line))
                code = child.wait()
            finally:
                # An interrupt, or an error of the caller's progress function.
                child.kill()
                child.wait()
                child.stdout.close()
            if code == 0 and self.answer is not None:
                return self.answer
            stderr.seek(0)
            raise self._died(code, stderr.read().decode(errors="replace"))

    def _event(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "log":
            self.log.append(event["text"])
        elif kind == "progress":
            self.progress(event["what"], event["share"])
        elif kind == "error":
            raise SemkvError(event.pop("what"), **event)
        elif kind == "result":
            self.answer = event

    def _died(self, code: int, stderr: str) -> SemkvError:
        lines = [line.strip() for line in [*self.log, *stderr.splitlines()] if line.strip()]
        fix = "report this with the graph: it is no fault of the input that is known"
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                fix = "give the machine more memory: the system kills a process that takes too much of it"
        return SemkvError(
            f"{TITLES[self.runtime]}'s process died",
            where=f"--target {self.runtime}",
            got=f"{how}; last lines of its log: {' | '.join(lines[-_LOG_LINES:]) or 'none'}",
            fix=fix,
        )


@contextmanager
def _beside(plan: Path) -> Iterator[Path]:
    """A file name beside `plan`; what is there when the block ends is removed."""
    try:
        plan.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be written to: {error.strerror}"
        raise SemkvError(what, where=plan.parent, fix="choose another -o") from None
    partial = plan.with_name(f".{plan.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)

"""The other end of `worker`: a process that has one engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any, Protocol

from semkv_deploy.bench.subjects import Subject
from semkv_deploy.errors import SemkvError


class Measured(Protocol):
    """Who is measured, as `rounds` sees it."""

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request of `worker`."""


class EngineProcess:
    """A process with one engine, from `with` to the end of it.

    Args:
        subject: what it measures.
        threads: that whatever computes in it has.
        batch: rows.
        context: tokens of a row.

    Raises:
        SemkvError: when the engine does not open, or fails at a request.
    """

    def __init__(self, subject: Subject, *, threads: int, batch: int, context: int) -> None:
        self._subject = subject
        self._options = {**subject.options, "threads": threads, "batch": batch, "context": context}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed at the end of `with`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "semkv_deploy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # OpenMP's pools, which some of them have, are as large as the others'.
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )

    def __enter__(self) -> EngineProcess:
        try:
            self.ask("open", kind=self._subject.kind, options=self._options)
            self.ask("warm_up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What it was doing is of no use any more: nothing of it lasts.
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            SemkvError: with what the engine says, or its last words when the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": {"what": self._last_words()}}
        if "error" in answer:
            parts = answer["error"]
            where = parts.pop("where", None) or self._subject.options["path"]
            raise SemkvError(f"measurement of {self._subject.name} failed: {parts.pop('what')}", where=where, **parts)
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        # A signal leaves no words: 9 is mostly the kernel's, out of memory.
        return lines[-1] if code > 0 and lines else f"the process ended with code {code}"

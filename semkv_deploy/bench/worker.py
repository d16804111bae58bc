"""One engine in a process of its own, driven by JSON lines: `python -m semkv_deploy.bench.worker`.

A process each keeps thread pools and memory of one out of the others. Each line in is a request, each line out its
answer, or {"error": …}. Nothing is done between requests, so that other processes can be timed.

| request | answer |
|---|---|
| open: kind, options | {} |
| prefill: rows | seconds |
| decode: count | ms (of a step) |
| end_turn | seconds |
| warm_up | {} |
| reset | {} |
| facts | what the engine says, peak_mib (own memory beside loaded weights; not of all engines), process_mib |
| about | what the runtime says of itself |
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from semkv_deploy.bench import memory
from semkv_deploy.bench.engines import open_engine
from semkv_deploy.bench.engines.base import WARM_UP, Engine
from semkv_deploy.errors import SemkvError


class Worker:
    """Answers requests: a method each."""

    _engine: Engine

    def open(self, *, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """Loads the model."""
        self._engine = open_engine(kind, options)
        self._batch = options["batch"]
        # Weights are loaded. Of caches whose memory is reported no page is resident before something is written to it.
        self._base, self._peak = memory.anonymous_bytes(), 0.0
        return {}

    def warm_up(self) -> dict[str, Any]:
        """Runs a few tokens and forgets them."""
        with self._watched():
            self._engine.prefill([list(range(3, 3 + WARM_UP))] * self._batch)
            self._engine.decode(2)
            self._engine.reset()
        return {}

    def prefill(self, *, rows: list[list[int]]) -> dict[str, Any]:
        """Appends a prompt."""
        with self._watched():
            return {"seconds": self._engine.prefill(rows)}

    def decode(self, *, count: int) -> dict[str, Any]:
        """Takes steps."""
        with self._watched():
            return {"ms": self._engine.decode(count)}

    def end_turn(self) -> dict[str, Any]:
        """Ends a turn."""
        with self._watched():
            return {"seconds": self._engine.end_turn()}

    def reset(self) -> dict[str, Any]:
        """Forgets the conversation."""
        self._engine.reset()
        return {}

    def facts(self) -> dict[str, Any]:
        """What is known now."""
        peak = {"peak_mib": self._peak} if self._engine.memory_shows else {}
        process = memory.most_resident_bytes(self._engine.pid) / (1 << 20)
        return {**self._engine.facts(), **peak, "process_mib": process}

    def about(self) -> dict[str, str]:
        """What the runtime says of itself."""
        return self._engine.about()

    @contextlib.contextmanager
    def _watched(self) -> Any:
        with memory.PeakMemory(self._base) as peak:
            yield
        self._peak = max(self._peak, peak.mib)


def error_fields(error: Exception) -> dict[str, Any]:
    """An error as data: the parts of a SemkvError, or the sentence of another."""
    if isinstance(error, SemkvError):
        parts = {name: getattr(error, name) for name in ("where", "expected", "got", "fix")}
        return {"what": error.what, **{name: str(part) for name, part in parts.items() if part is not None}}
    return {"what": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answers requests until standard input ends."""
    # What libraries print goes to standard error: the answers have standard output for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": error_fields(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # Threads that libraries have left running would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()

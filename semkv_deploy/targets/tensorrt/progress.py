"""Progress of an engine build: the builder's nested phases as one share of the whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

_INTERVAL_S = 0.1


def make_monitor(trt: ModuleType, emit: Callable[[dict[str, Any]], None], what: str) -> Any:
    """A `trt.IProgressMonitor` that turns the builder's nested phases into one share of the whole."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.phases = PhaseShares()
            self.lock = threading.Lock()
            self.told = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self.lock:
                self.phases.start(phase, parent, steps)
            self.tell()

        def step_complete(self, phase: str, step: int) -> bool:
            with self.lock:
                self.phases.step(phase, step)
            self.tell()
            return True

        def phase_finish(self, phase: str) -> None:
            with self.lock:
                self.phases.finish(phase)

        def tell(self) -> None:
            now = time.monotonic()
            if now - self.told > _INTERVAL_S:
                self.told = now
                emit({"event": "progress", "what": what, "share": self.phases.share})

    return Monitor()


class PhaseShares:
    """Nested phases with steps -> the share of the outermost one that is done, which never falls.

    A phase counts within the step of its parent that is under way.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self._phases: dict[str, tuple[str | None, int, int]] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = parent, max(steps, 1), 0

    def step(self, phase: str, step: int) -> None:
        if phase in self._phases:
            parent, steps, _ = self._phases[phase]
            self._phases[phase] = parent, steps, min(step + 1, steps)
            self._update(phase)

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)

    def _update(self, phase: str) -> None:
        share, current = 0.0, phase
        while True:
            parent, steps, done = self._phases[current]
            share = min((done + (share if current != phase else 0.0)) / steps, 1.0)
            if parent is None or parent not in self._phases:
                break
            current = parent
        if parent is None:
            self.share = max(self.share, share)

"""Memory of this process (Linux): what is its own (what is mapped from files, such as weights read in place, is not),
and all that was ever resident."""

from __future__ import annotations

import threading
from pathlib import Path

_INTERVAL_S = 0.01


def _bytes(field: str, pid: int | None = None) -> int:
    status = Path("/proc") / ("self" if pid is None else str(pid)) / "status"
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def anonymous_bytes() -> int:
    """Anonymous bytes resident now."""
    return _bytes("RssAnon")


def most_resident_bytes(pid: int | None = None) -> int:
    """Most bytes of any kind that were resident at one time since the process began: what a limit on it must allow.

    Args:
        pid: of another process; None: this one.
    """
    return _bytes("VmHWM", pid)


class PeakMemory:
    """Most anonymous bytes that came on top while the block ran, sampled every 10 ms: the kernel keeps no such peak.

    Args:
        base: bytes that they come on top of; None: those that are resident when the block begins.
    """

    def __init__(self, base: int | None = None) -> None:
        self._base = base

    def __enter__(self) -> PeakMemory:
        self._peak = anonymous_bytes()
        if self._base is None:
            self._base = self._peak
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._peak = max(self._peak, anonymous_bytes())

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._peak = max(self._peak, anonymous_bytes())

    @property
    def mib(self) -> float:
        """The peak in MiB."""
        assert self._base is not None
        return (self._peak - self._base) / (1 << 20)

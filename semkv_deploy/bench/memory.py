"""Memory of this process that is its own (Linux): what is mapped from files, such as weights read in place, is not."""

from __future__ import annotations

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.01


def anonymous_bytes() -> int:
    """Anonymous bytes resident now."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Most anonymous bytes that came on top while the block ran, sampled every 10 ms: the kernel keeps no such peak."""

    def __enter__(self) -> PeakMemory:
        self._base = self._peak = anonymous_bytes()
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
        return (self._peak - self._base) / (1 << 20)

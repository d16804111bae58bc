"""Resident memory of this process (Linux)."""

from __future__ import annotations

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Bytes resident now."""
    return _field("VmRSS")


def peak_resident_bytes() -> int:
    """Most bytes resident since the process started or `reset_peak` was called."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Starts a new peak."""
    _CLEAR.write_text("5")


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

"""How many threads are worth having: the CPUs that this process may use, which can be fewer than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cpus(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """CPUs that the scheduler gives this process: its affinity, cut by the quotas of its control groups; 1 at least.

    A thread more than that only takes time from the others: ONNX Runtime's wait for work by spinning.

    Args:
        cgroups: where control groups are mounted.
        own: the file that names this process's.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _quotas(cgroups, own)]
    return max(1, min([count, *quotas]))


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """CPUs' worth of time that each control group of this process, or one above it, may take; none where unlimited."""
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        if number == "0" and not controllers:
            root = cgroups
        elif "cpu" in controllers.split(","):
            root = cgroups / controllers
        else:
            continue
        # A container sees its own group as the root, whatever path it is told.
        for folder in dict.fromkeys([root / inside, *(root / parent for parent in inside.parents), root]):
            parts = _read(folder / "cpu.max").split() or [
                _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
            ]
            if len(parts) == 2 and all(part.isdecimal() and int(part) for part in parts):
                yield int(parts[0]) / int(parts[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""

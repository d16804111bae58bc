"""The report of one run: what failed, what was not measured, and how long is left. Always on disk, whatever happens."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class NotMeasured(Exception):
    """Why a case was not run here: no fault of the kernels."""


def finite(value: Any) -> Any:
    """`value` as JSON takes it: numbers that JSON has no word for as "nan", "inf" or "-inf"."""
    if isinstance(value, dict):
        return {str(key): finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


class Report:
    """Collects results; `attempt` keeps one case's failure from taking the others with it.

    path: where the JSON goes, rewritten after every case; None: nowhere. seconds: no case starts later than this.
    """

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.seconds, self.started = path, seconds, time.monotonic()
        self.data: dict[str, Any] = {"finished": False, "failures": [], "not_measured": []}
        self.context_lost = ""

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def stopped(self) -> str:
        """Why no further case can run: the time is up, or the GPU's context is lost; empty: go on."""
        return self.context_lost or ("time limit" if self.elapsed() > self.seconds else "")

    def fail(self, what: str) -> None:
        """Record a failure and say it."""
        self.data["failures"].append(what)
        print(f"FAILED: {what}", flush=True)

    def skip(self, what: str, why: str) -> None:
        """Record what was not run, and why."""
        self.data["not_measured"].append(f"{what}: {why}")

    def attempt(self, name: str, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run one case; its result, or {"not_measured": why} or {"failed": what}. Its "failures" are failures of the
        run. After an error that takes the CUDA context with it, no case can run any more."""
        try:
            if why := self.stopped():
                raise NotMeasured(why)
            result = case()
            for failure in result.get("failures", []):
                self.fail(f"{name}: {failure}")
        except (NotMeasured, torch.cuda.OutOfMemoryError) as reason:
            result = {"not_measured": first_line(reason)}
            self.skip(name, result["not_measured"])
        except Exception as error:
            result = {"failed": first_line(error)}
            self.fail(f"{name}: {first_line(error)}")
            traceback.print_exc()
            self.look_for_the_context()
        self.save()
        return result

    def look_for_the_context(self) -> None:
        """After an error: whether the GPU still answers."""
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except Exception as error:
                self.context_lost = f"an earlier error lost the GPU's context: {first_line(error)}"

    def save(self) -> None:
        """Write the JSON, whole or not at all."""
        self.data["seconds"] = round(self.elapsed(), 1)
        if self.path is not None:
            beside = self.path.with_name(self.path.name + ".part")
            beside.write_text(json.dumps(finite(self.data), indent=1, allow_nan=False) + "\n")
            os.replace(beside, self.path)


def first_line(error: BaseException) -> str:
    """An exception's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

"""Talks to semkv_driver: a line of JSON a call, and a line of JSON back."""

from __future__ import annotations

import glob
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray


def onnxruntime_library() -> str:
    """The library that Python's onnxruntime runs: both sides have the same kernels."""
    import onnxruntime

    (library,) = glob.glob(str(Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime.so*"))
    return library


class CppError(Exception):
    """What libsemkv refused, with its code (SEMKV_…, as a number)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Driver:
    """A session of libsemkv in a process of its own.

    Args:
        program: semkv_driver.
        environment: added to this process's.
    """

    def __init__(self, program: Path, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _, errors = self._process.communicate()
        # A sanitizer speaks there, and ends the process.
        if kind is None:
            assert self._process.returncode == 0, errors[-4000:]

    def __call__(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise AssertionError(f"semkv_driver ended: {self._process.stderr.read()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise CppError(answer["code"], answer["error"])
        return answer["ok"]

    def open(self, bundle: Path, batch: int = 1, **options: Any) -> None:
        """A session on the bundle, in place of the one there was; one thread, as the tests' sessions have."""
        self("open", bundle=str(bundle), batch=batch, **{"onnxruntime": onnxruntime_library(), "threads": 1, **options})

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        return np.array(self("prefill", rows=rows), np.float32)

    def step(self, ids: Sequence[int], active: Sequence[bool] | None = None) -> NDArray[np.float32]:
        given = {} if active is None else {"active": [int(each) for each in active]}
        return np.array(self("step", ids=list(ids), **given), np.float32)

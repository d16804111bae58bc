"""Targets: build for a runtime, and open what was built. `TARGETS` and `TO_RUN` say what this machine lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from semkv_deploy.choices import TensorRTTarget
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from semkv_deploy.bundle.opened import OpenedBudget
    from semkv_deploy.targets.engine import Engine


def _missing_onnxruntime() -> str | None:
    from semkv_deploy.targets.onnxruntime.place import HOST

    return HOST.missing()


def _missing_cuda_to_run() -> str | None:
    from semkv_deploy.targets.onnxruntime.native import missing_cuda
    from semkv_deploy.targets.onnxruntime.place import place_of
    from semkv_deploy.targets.tensorrt.api import find_gpu

    place = place_of("onnxruntime-cuda")
    gpu, no_gpu = find_gpu()
    return place.missing() or missing_cuda() or (None if gpu else no_gpu)


def _missing_tensorrt(runtime: TensorRTTarget, *, to_run: bool) -> str | None:
    from semkv_deploy.targets.tensorrt.api import missing, missing_to_run

    return missing_to_run(runtime) if to_run else missing(runtime)


TARGETS: dict[str, Callable[[], str | None]] = {
    "onnxruntime-cpu": _missing_onnxruntime,
    # Graphs are written, and calibrated on the CPU.
    "onnxruntime-cuda": _missing_onnxruntime,
    "tensorrt-rtx": lambda: _missing_tensorrt("tensorrt-rtx", to_run=False),
    "tensorrt": lambda: _missing_tensorrt("tensorrt", to_run=False),
}
"""Targets that can be built, and what this machine lacks to build for each (None: nothing)."""

TO_RUN: dict[str, Callable[[], str | None]] = {
    "onnxruntime-cpu": _missing_onnxruntime,
    "onnxruntime-cuda": _missing_cuda_to_run,
    "tensorrt-rtx": lambda: _missing_tensorrt("tensorrt-rtx", to_run=True),
    "tensorrt": lambda: _missing_tensorrt("tensorrt", to_run=True),
}
"""What this machine lacks to run what was built for each target (None: nothing)."""


def is_tensorrt(target: str) -> TypeIs[TensorRTTarget]:
    """Whether `target` is one of the TensorRT runtimes."""
    return target in ("tensorrt", "tensorrt-rtx")


def require_available(target: str, *, engines: bool = True) -> None:
    """Fails unless bundles can be built for `target` on this machine.

    Args:
        engines: False: only graphs are written for TensorRT targets, which takes nothing of theirs.

    Raises:
        SemkvError: for an unknown target, or one that is not available here, with how to get it.
    """
    expected = " or ".join(TARGETS)
    if not engines and is_tensorrt(target):
        return
    if target not in TARGETS:
        raise SemkvError("unknown target", where="--target", expected=expected, got=target)
    missing = TARGETS[target]()
    if missing:
        raise SemkvError("not available on this machine", where=f"--target {target}", fix=missing)


def require_runnable(target: str) -> None:
    """Fails unless what was built for `target` runs on this machine.

    Raises:
        SemkvError: for an unknown target, or one that does not run here, with what is missing.
    """
    if target not in TO_RUN:
        require_available(target)
    missing = TO_RUN[target]()
    if missing:
        raise SemkvError("does not run on this machine", where=f"--target {target}", fix=missing)


def open_engine(built: OpenedBudget, *, batch: int = 1, threads: int | None = None, in_place: bool = True) -> Engine:
    """The engine of the runtime that a budget was built for, its buffers empty.

    Args:
        batch: rows; of a TensorRT target those that were built for.
        threads, in_place: see `onnxruntime.engine.OnnxRuntimeEngine`; the others ignore them.

    Raises:
        SemkvError: when the target does not run here, or not with this batch.
    """
    if is_tensorrt(built.contract.target):
        from semkv_deploy.targets.tensorrt.engine import TensorRTEngine

        return TensorRTEngine(built, batch=batch)
    from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(built, batch=batch, threads=threads, in_place=in_place)

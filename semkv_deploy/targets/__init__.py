"""Targets: build for a runtime, and open what was built. `availability` says what this machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from semkv_deploy.errors import SemkvError


def _missing_onnxruntime(provider: str, package: str) -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return f"install ONNX Runtime: pip install 'semkv-deploy[{package}]'"
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return (
            f"this onnxruntime has no {provider}: pip install 'semkv-deploy[{package}]' on a machine with an NVIDIA GPU"
        )
    return None


TARGETS: dict[str, Callable[[], str | None]] = {
    "onnxruntime-cpu": lambda: _missing_onnxruntime("CPUExecutionProvider", "cpu"),
}
"""Targets that can be built, and what this machine lacks for each (None: nothing)."""

PLANNED = {
    "onnxruntime-cuda": "bundles are not built for it yet",
    "tensorrt": "bundles are not built for it yet",
    "tensorrt-rtx": "bundles are not built for it yet",
}
"""Targets of the design that this version does not build for."""


def require_available(target: str) -> None:
    """Fails unless bundles can be built for `target` on this machine.

    Raises:
        SemkvError: for an unknown target, or one that is not available here, with how to get it.
    """
    expected = " or ".join(TARGETS)
    if target in PLANNED:
        raise SemkvError(
            f"{PLANNED[target]}", where=f"--target {target}", expected=expected, fix="build for onnxruntime-cpu"
        )
    if target not in TARGETS:
        raise SemkvError("unknown target", where="--target", expected=expected, got=target)
    missing = TARGETS[target]()
    if missing:
        raise SemkvError("not available on this machine", where=f"--target {target}", fix=missing)

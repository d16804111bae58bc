"""Where the graphs of a target run: ONNX Runtime's provider, its memory, and the library of its native operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.onnxruntime import native

if TYPE_CHECKING:
    from semkv_deploy.targets.onnxruntime.buffers import Buffer

GROUP_WORKERS = 2
"""Groups that a program runs for at the same time at most on a CPU; each takes one set of spare buffers."""


class Place(NamedTuple):
    """What runs the graphs of a target.

    Attributes:
        provider, options: ONNX Runtime's.
        device: of buffers, as ONNX Runtime names it; None: this process's memory.
        workers: groups that a program runs for at the same time at most.
        library: the path of the library of a version, or a `SemkvError`.
        package: extra of this package that has the provider.
    """

    target: str
    provider: str
    library: Callable[[int], Path]
    package: str
    options: Mapping[str, str] = MappingProxyType({})
    device: tuple[str, int] | None = None
    workers: int = GROUP_WORKERS

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Zeros."""
        from semkv_deploy.targets.onnxruntime.buffers import DeviceBuffer, HostBuffer

        return HostBuffer(shape, dtype) if self.device is None else DeviceBuffer(shape, dtype, self.device)

    def missing(self) -> str | None:
        """Why ONNX Runtime here has no such provider, and how to get it; None: it has it."""
        if importlib.util.find_spec("onnxruntime") is None:
            return f"install ONNX Runtime: pip install 'semkv-deploy[{self.package}]'"
        import onnxruntime

        if self.provider not in onnxruntime.get_available_providers():
            return (
                f"this onnxruntime has no {self.provider}: pip install 'semkv-deploy[{self.package}]' on a machine "
                "with an NVIDIA GPU"
            )
        return None

    def check(self) -> None:
        """Fails where ONNX Runtime here has no such provider.

        Raises:
            SemkvError: with how to get it.
        """
        if lacking := self.missing():
            raise SemkvError("does not run on this machine", where=f"target {self.target}", fix=lacking)


HOST = Place("onnxruntime-cpu", "CPUExecutionProvider", native.required_library, "cpu")

# Products in full float32, as everything is compared with; a stream runs one graph after the other anyway.
CUDA = Place(
    "onnxruntime-cuda",
    "CUDAExecutionProvider",
    native.required_cuda_library,
    "gpu",
    options=MappingProxyType({"use_tf32": "0"}),
    device=("cuda", 0),
    workers=1,
)

PLACES: dict[str, Place] = {CUDA.target: CUDA}
"""By target; those that are not here, the portable graphs among them, run on the host."""


def place_of(target: str) -> Place:
    """Where a target's graphs run in ONNX Runtime."""
    return PLACES.get(target, HOST)

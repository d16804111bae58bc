"""Cache buffers that ONNX Runtime's graphs are bound to by their addresses: in this process's memory, or a device's."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from semkv_deploy.targets.engine import NUMPY_TYPES, Array

CACHE_LINE = 64
"""Bytes."""

ONNX_TYPES = {"float32": 1, "int8": 3, "int64": 7, "float16": 10, "bfloat16": 16}
"""ONNX's numbers of the types."""


def array_type(dtype: str) -> Any:
    """NumPy's type of a buffer; bfloat16 is of the package that onnx uses."""
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.int8 if dtype == "int8" else NUMPY_TYPES[dtype]


class Buffer(Protocol):
    """Zeros of a shape `[batch,…]`, in memory that stays where it is.

    Attributes:
        device: what ONNX Runtime calls the memory, "cpu" or "cuda", and its number.
        address: of the first byte.
        nbytes: of all elements.
        value: the OrtValue of the whole, made once: a group's program takes little longer than to make a dozen of them.
    """

    device: tuple[str, int]
    shape: tuple[int, ...]
    dtype: str
    address: int
    nbytes: int
    value: Any

    def numpy(self) -> Array:
        """The contents, not to be written to: the memory itself where this process has it, else a copy."""

    def fill(self, rows: slice, array: Array | float) -> None:
        """Writes batch rows."""


class HostBuffer:
    """A buffer in this process's memory: pages are mapped on first touch, so slots never used cost nothing."""

    device = ("cpu", 0)

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self._array = _aligned_zeros(shape, array_type(dtype))
        self.address, self.nbytes = self._array.ctypes.data, self._array.nbytes
        values = _onnxruntime().OrtValue
        if dtype == "bfloat16":
            self.value = values.ortvalue_from_numpy_with_onnx_type(self._array.view(np.uint16), ONNX_TYPES[dtype])
        else:
            self.value = values.ortvalue_from_numpy(self._array)

    def numpy(self) -> Array:
        return self._array

    def fill(self, rows: slice, array: Array | float) -> None:
        self._array[rows] = array


class DeviceBuffer:
    """A buffer that ONNX Runtime allocates on a device; what the host writes and reads is copied whole.

    Args:
        dtype: one that NumPy has itself.
        device: as ONNX Runtime names it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: tuple[str, int]) -> None:
        self.device, self.shape, self.dtype = device, shape, dtype
        zeros = np.zeros(shape, array_type(dtype))
        self.value = _onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, zeros.dtype.type, *device)
        self.value.update_inplace(zeros)
        self.address, self.nbytes = self.value.data_ptr(), zeros.nbytes

    def numpy(self) -> Array:
        # On a CPU ONNX Runtime may give the memory itself.
        found: Array = self.value.numpy().copy()
        return found

    def fill(self, rows: slice, array: Array | float) -> None:
        contents = self.numpy()
        contents[rows] = array
        self.value.update_inplace(contents)


def _onnxruntime() -> Any:
    import onnxruntime

    return onnxruntime


def _aligned_zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros that begin with a cache line: a row that is read by itself then lies in as few of them as it can."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    zeros: Array = memory[begin : begin + size].view(dtype).reshape(shape)
    return zeros


class Binding:
    """Inputs and outputs of a graph, bound to memory that this object keeps alive.

    Args:
        session: ONNX Runtime's, of the graph.
        copies_inputs: ONNX Runtime copies what this process holds to a device when it is bound: what changed since has
            to be bound anew.
    """

    def __init__(self, session: Any, *, copies_inputs: bool) -> None:
        self._session, self._copies_inputs = session, copies_inputs
        self._binding = session.io_binding()
        self._held: list[object] = []
        self._inputs: dict[str, Array] = {}

    def buffer(
        self,
        name: str,
        buffer: Buffer,
        *,
        output: bool,
        rows: slice = slice(None),
        shape: tuple[int | str, ...] | None = None,
    ) -> None:
        """Binds batch rows of a buffer.

        Args:
            shape: of the graph's tensor: heads may lie in the batch axis.
        """
        first, end, _ = rows.indices(buffer.shape[0])
        stride = buffer.nbytes // buffer.shape[0]
        sizes = (end - first, *buffer.shape[1:])
        if shape is not None and not (len(shape) == len(sizes) and shape[1] == sizes[1]):
            rest = [size for size in shape[1:] if isinstance(size, int)]
            sizes = (int(np.prod(sizes)) // int(np.prod(rest)), *rest)
        self._held.append(buffer)
        if sizes == buffer.shape:
            bind_value = self._binding.bind_ortvalue_output if output else self._binding.bind_ortvalue_input
            bind_value(name, buffer.value)
            return
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, *buffer.device, ONNX_TYPES[buffer.dtype], sizes, buffer.address + first * stride)

    def input(self, name: str, array: Array) -> None:
        """Binds an array of this process, whose contents may change between runs."""
        self._inputs[name] = array
        self._bind_input(name)

    def output(self, name: str, array: Array) -> None:
        """Binds an array of this process to write to."""
        self._held.append(array)
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def new_output(self, name: str) -> None:
        """Lets ONNX Runtime allocate an output, in this process's memory."""
        self._binding.bind_output(name)

    def _bind_input(self, name: str) -> None:
        array = self._inputs[name]
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        """Runs the graph."""
        if self._copies_inputs:
            for name in self._inputs:
                self._bind_input(name)
            self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding)
        if self._copies_inputs:
            self._binding.synchronize_outputs()

    def outputs(self) -> list[Any]:
        """The outputs of the run, ONNX Runtime's, in the order in which they were bound."""
        found: list[Any] = self._binding.get_outputs()
        return found

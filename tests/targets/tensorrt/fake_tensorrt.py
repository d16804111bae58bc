"""TensorRT's execution API and CUDA's memory on the host: an engine runs the graph it was built from in ONNX Runtime.

As strict as the real ones: every tensor needs an address inside memory that was allocated and not freed, shapes must
lie in the active profile, and both names of an alias pair need one address. Fresh memory is NaN.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from semkv_deploy.bundle import sha256
from semkv_deploy.bundle.contract import GraphContract

TYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


class HostCuda:
    """What `polygraphy.cuda.wrapper()` gives, in host memory."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def malloc(self, nbytes: int) -> int:
        block = (ctypes.c_char * nbytes)()
        ctypes.memset(block, 0xFF, nbytes)  # NaN in every float type: nothing may rely on cleared memory
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, ptr: int) -> None:
        self.blocks.pop(ptr, None)

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: Any = None) -> None:
        device = {1: dst, 2: src}[kind.value]
        assert self.holds(device, nbytes)
        ctypes.memmove(dst, src, nbytes)

    def holds(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + len(b) for start, b in self.blocks.items())

    def create_stream(self) -> int:
        return 1

    def stream_synchronize(self, ptr: int) -> None:
        assert ptr == 1

    def destroy_stream(self, ptr: int) -> None: ...


class FakeTensorRT:
    """The module.

    Args:
        graphs: contract and ONNX file of each plan, by the plan's SHA-256.
    """

    def __init__(self, cuda: HostCuda, graphs: dict[str, tuple[GraphContract, Path]]) -> None:
        module = self
        self.cuda, self.graphs = cuda, graphs
        self.runs: list[tuple[str, int]] = []
        """(phase, profile) of every run."""

        class Logger:
            WARNING = 2

            def __init__(self, severity: int) -> None: ...

        class Runtime:
            engine_host_code_allowed = False

            def __init__(self, logger: Logger) -> None: ...

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                found = module.graphs.get(hashlib.sha256(data).hexdigest())
                return found and _Engine(module, *found)

        self.Logger, self.Runtime = Logger, Runtime


class _Engine:
    def __init__(self, module: FakeTensorRT, contract: GraphContract, graph: Path) -> None:
        self.module, self.contract = module, contract
        self.session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.tensors = [*contract.inputs, *contract.outputs]
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return {result: source for source, result in self.contract.aliases.items()}.get(name)

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == 1
        self.profile, self.shapes = index, {}
        return index < len(self.engine.contract.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        contract = self.engine.contract
        tensor = next(each for each in contract.inputs if each.name == name)
        if len(shape) != len(tensor.shape) or any(
            isinstance(fixed, int) and fixed != size for fixed, size in zip(tensor.shape, shape, strict=True)
        ):
            return False
        if name in contract.profiles[self.profile].shapes:
            low, _, high = contract.profiles[self.profile].shapes[name]
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 1
        engine, contract, cuda = self.engine, self.engine.contract, self.engine.module.cuda
        engine.module.runs.append((contract.phase, self.profile))
        for source, result in contract.aliases.items():
            assert self.addresses[source] == self.addresses[result], (source, result)
        feed = {}
        for tensor in contract.inputs:
            static = all(isinstance(size, int) for size in tensor.shape)
            shape = tuple(tensor.shape) if static else self.shapes[tensor.name]
            feed[tensor.name] = self._array(cuda, tensor.name, shape, TYPES[tensor.dtype]).copy()
        names = [tensor.name for tensor in contract.outputs]
        for name, array in zip(names, engine.session.run(names, feed), strict=True):
            self._array(cuda, name, array.shape, array.dtype)[:] = array
        return True

    def _array(self, cuda: HostCuda, name: str, shape: Any, dtype: Any) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert cuda.holds(self.addresses[name], size), f"{name}: {size} bytes at {self.addresses[name]:#x}"
        block = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(block, dtype).reshape(shape)


def graphs_of(bundle: Any, target: str) -> dict[str, tuple[GraphContract, Path]]:
    """What `FakeTensorRT` needs of a bundle's plans."""
    found = {}
    for budget in bundle.target(target).budgets:
        for graph in budget.contract.graphs:
            found[sha256(bundle.root / graph.plan)] = (graph, bundle.root / graph.onnx)
    return found

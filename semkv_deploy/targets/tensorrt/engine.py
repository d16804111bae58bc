"""Runs a bundle's TensorRT engines on a GPU, from nothing but their contract: caches on the device, appended in place.

A C++ or Triton host does the same: allocate what the contract says, give both names of an alias pair one address,
choose the optimization profile whose shapes fit, compress layer by layer into spare buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from polygraphy import cuda

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.base import STATE
from semkv_deploy.model.config import layer_tag
from semkv_deploy.targets.onnxruntime.engine import Compressed, Layer
from semkv_deploy.targets.tensorrt.api import TITLES, Runtime, runtime_module
from semkv_deploy.targets.tensorrt.plan_file import check_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.bundle.contract import GraphContract, Phase, StaticBudgetContract, TensorContract

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
_HOST_TYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


class TensorRTEngine:
    """The caches of one session, and the engines that work on them.

    Args:
        runtime: whose engines they are.
        plans: engine file of each phase of the contract's graphs.
        contract: of the budget.
        groups: cluster groups G of the compressor.
        plugins: operators that are plugins in the engines; their library is embedded, and run.

    Raises:
        SemkvError: when an engine is damaged, of another version, or not what the contract says.
    """

    def __init__(
        self,
        runtime: Runtime,
        plans: Mapping[Phase, Path],
        contract: StaticBudgetContract,
        *,
        groups: int = 1,
        plugins: Sequence[str] = (),
    ) -> None:
        for plan in plans.values():
            check_plan(plan, runtime)
        self.contract, self.batch, self.capacity, self.groups = contract, contract.batch, contract.capacity, groups
        self._stream = cuda.Stream()
        trt = runtime_module(runtime)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._runtime.engine_host_code_allowed = bool(plugins)
        graphs = {graph.phase: graph for graph in contract.graphs}
        engines = {
            phase: _Engine(self._runtime, plan, graphs[phase], self._stream, TITLES[runtime])
            for phase, plan in plans.items()
        }
        self._compressor = engines.pop("compressor", None)
        self._decoders = list(engines.values())
        self._layers = [self._new_layer() for _ in range(contract.layers)]
        self._spare = self._new_layer() if self._compressor else None

    def _new_layer(self) -> _DeviceLayer:
        rows = self.batch * self.contract.kv_heads * self.capacity
        cache = rows * self.contract.head_dim * _BYTES[self.contract.dtype]
        layer = _DeviceLayer(*(cuda.DeviceArray.raw((size,)) for size in (cache, cache, rows * 4)))
        for buffer in layer:
            _clear(buffer)
        return layer

    @property
    def layers(self) -> list[Layer]:
        """Copies of the buffers: `key` and `value` `[B,H,C,D]` (bfloat16 as float32), `bias` `[B,H,C]`."""
        shape = (self.batch, self.contract.kv_heads, self.capacity)
        rows, dtype = (*shape, self.contract.head_dim), self.contract.dtype
        return [
            Layer(_read(layer.key, rows, dtype), _read(layer.value, rows, dtype), _read(layer.bias, shape, "float32"))
            for layer in self._layers
        ]

    def cache_bytes(self) -> int:
        """Bytes of all cache buffers on the device, the spare layer and biases included."""
        layers = [*self._layers, *([self._spare] if self._spare else [])]
        return sum(buffer.nbytes for layer in layers for buffer in layer)

    def reset(self) -> None:
        """Forgets every slot (what dead slots hold changes nothing, so only biases are cleared)."""
        for layer in self._layers:
            _clear(layer.bias)

    def run(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        length: NDArray[np.int64],
        row: int | None = None,
    ) -> NDArray[np.float32]:
        """As `OnnxRuntimeEngine.run`: appends `S` tokens to one row, or one token to every row.

        Raises:
            SemkvError: when no optimization profile takes this many rows or tokens.
        """
        n, count = tokens.shape
        sizes = {
            "batch": n,
            "sequence": count,
            "rows": logits_index.shape[1],
            "cache_rows": n * self.contract.kv_heads,
        }
        engine, profile = self._choose(sizes)
        small = {
            "input_ids": tokens,
            "position_ids": positions,
            "logits_index": logits_index,
            "length": length,
        }
        buffers: dict[str, int] = {}
        for number, layer in enumerate(self._layers):
            tag = layer_tag(number, self.contract.layers)
            names = (f"past_key_values.{tag}.key", f"past_key_values.{tag}.value", f"slot_bias.{tag}")
            for name, buffer in zip(names, layer, strict=True):
                # Rows of a batch lie one after the other, heads within them.
                address = buffer.ptr + (row or 0) * (buffer.nbytes // self.batch)
                buffers[name] = address
                if name in engine.graph.aliases:
                    buffers[engine.graph.aliases[name]] = address
        outputs = engine.run(profile, sizes, small, buffers, ["logits"])
        return outputs["logits"].astype(np.float32, copy=False)

    def _choose(self, sizes: dict[str, int]) -> tuple[_Engine, int]:
        """The engine and the profile for a run; of those that fit, the one that was tuned for it."""
        wanted = "decode" if sizes["sequence"] == 1 and sizes["batch"] == self.batch else "prefill"
        found = [
            (phase != wanted, number, engine, profile)
            for number, engine in enumerate(self._decoders)
            for profile, phase in enumerate(engine.phases)
            if engine.fits(profile, sizes)
        ]
        if not found:
            raise SemkvError(
                "no engine takes a run of this shape",
                where=f"budget {self.contract.budget:g}, layout {self.contract.layout}",
                expected=f"one row of at most {self.contract.prefill_chunk} tokens, or one token for each of "
                f"{self.batch} rows",
                got=f"{sizes['batch']} rows of {sizes['sequence']} tokens, {sizes['rows']} rows of logits",
            )
        _, _, engine, profile = min(found, key=lambda each: each[:2])
        return engine, profile

    def compress(
        self, state: Sequence[dict[str, NDArray[np.int64]]], inputs: Sequence[dict[str, Any]]
    ) -> list[Compressed]:
        """As `OnnxRuntimeEngine.compress`, one layer after the other."""
        assert self._compressor is not None and self._spare is not None, "the method never compresses"
        small_outputs = [f"{name}_out" for name in STATE[3:]] + ["level", "evicted"]
        done = []
        for number, (metadata, extra) in enumerate(zip(state, inputs, strict=True)):
            source, target = self._layers[number], self._spare
            buffers = {name: buffer.ptr for name, buffer in zip(STATE[:3], source, strict=True)}
            buffers |= {f"{name}_out": buffer.ptr for name, buffer in zip(STATE[:3], target, strict=True)}
            outputs = self._compressor.run(0, {}, {**metadata, **extra}, buffers, small_outputs)
            self._layers[number], self._spare = target, source
            done.append(Compressed(*(outputs[name] for name in small_outputs)))
        return done


class _DeviceLayer(NamedTuple):
    """A layer's buffers, or spare ones."""

    key: cuda.DeviceArray
    value: cuda.DeviceArray
    bias: cuda.DeviceArray


class _Engine:
    """One engine and its only execution context: profiles take turns in its activation memory."""

    def __init__(self, runtime: Any, plan: Path, graph: GraphContract, stream: cuda.Stream, title: str) -> None:
        self.graph, self._stream, self._plan = graph, stream, plan
        self.phases: list[str] = [profile.phase for profile in graph.profiles] or [graph.phase]
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise SemkvError(
                f"{title} does not open the engine",
                where=plan,
                fix="build it for the compute capability of this GPU, with the version that is installed here",
            )
        self._engine = engine
        self._check()
        self._context = engine.create_execution_context()
        if self._context is None:
            raise SemkvError("the GPU's memory does not suffice for the engine's activations", where=plan)
        self._profile = 0
        self._small: dict[str, cuda.DeviceArray] = {}

    def _check(self) -> None:
        """The engine's tensors and alias pairs are the contract's."""
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*self.graph.inputs, *self.graph.outputs)}
        if names != expected:
            raise SemkvError(
                "the engine is not the contract's",
                where=self._plan,
                expected=sorted(expected - names)[:3] or "no more tensors",
                got=sorted(names - expected)[:3] or "none of them",
            )
        # Not there before TensorRT 10.15, where only plugins append in place; of theirs nothing is returned anyway.
        aliased = getattr(self._engine, "get_aliased_input_tensor", lambda name: None)
        for source, result in self.graph.aliases.items():
            found = aliased(result)
            if found and found != source:
                raise SemkvError(
                    "the engine aliases other tensors than the contract",
                    where=f"{self._plan}: {result}",
                    expected=source,
                    got=found,
                )

    def fits(self, profile: int, sizes: Mapping[str, int]) -> bool:
        """Whether a profile takes inputs of these sizes."""
        limits = self.graph.profiles[profile].shapes if self.graph.profiles else {}
        for tensor in self.graph.inputs:
            shape = _shape(tensor, sizes)
            low, _, high = limits.get(tensor.name, (shape, shape, shape))
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return False
            # A size that the graph has as a number is not in the shape's symbols.
            if tensor.name == "input_ids" and shape != (sizes["batch"], sizes["sequence"]):
                return False
            if tensor.name == "logits_index" and shape != (sizes["batch"], sizes["rows"]):
                return False
        return True

    def run(
        self,
        profile: int,
        sizes: Mapping[str, int],
        small: Mapping[str, Any],
        buffers: Mapping[str, int],
        wanted: Sequence[str],
    ) -> dict[str, NDArray[Any]]:
        """Runs once and waits.

        Args:
            profile: index of the optimization profile.
            sizes: of the symbols in the contract's shapes.
            small: inputs on the host, by name; more than the graph has is fine.
            buffers: device address of the other inputs and outputs, by name.
            wanted: outputs to copy to the host.
        """
        context, stream = self._context, self._stream
        if profile != self._profile:
            _require(context.set_optimization_profile_async(profile, stream.ptr), "switch its profile", self._plan)
            self._profile = profile
        held = []
        for tensor in self.graph.inputs:
            shape = _shape(tensor, sizes)
            if len(self.graph.profiles):
                _require(context.set_input_shape(tensor.name, shape), f"take {tensor.name} of {shape}", self._plan)
            address = buffers.get(tensor.name)
            if address is None:
                # Of the host until the copy has been made.
                held.append(np.ascontiguousarray(np.reshape(small[tensor.name], shape), _HOST_TYPES[tensor.dtype]))
                address = self._on_device(tensor.name, held[-1].nbytes).ptr
                _copy_in(address, held[-1], stream)
            _require(context.set_tensor_address(tensor.name, address), f"take {tensor.name}", self._plan)
        results: dict[str, NDArray[Any]] = {}
        for tensor in self.graph.outputs:
            address = buffers.get(tensor.name)
            if address is None:
                result = np.empty(_shape(tensor, sizes), _HOST_TYPES[tensor.dtype])
                address = self._on_device(tensor.name, result.nbytes).ptr
                results[tensor.name] = result
            _require(context.set_tensor_address(tensor.name, address), f"take {tensor.name}", self._plan)
        _require(context.execute_async_v3(stream.ptr), "run", self._plan)
        for name in wanted:
            cuda.DeviceView(self._small[name].ptr, results[name].shape, results[name].dtype).copy_to(
                results[name], stream
            )
        stream.synchronize()
        return {name: results[name] for name in wanted}

    def _on_device(self, name: str, size: int) -> cuda.DeviceArray:
        """A buffer of at least `size` bytes that stays until a larger one is asked for."""
        if name not in self._small or self._small[name].nbytes < size:
            self._small[name] = cuda.DeviceArray.raw((max(size, 1),))
        return self._small[name]


def _shape(tensor: TensorContract, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def _require(done: bool, what: str, plan: Path) -> None:
    if not done:
        raise SemkvError(f"the engine does not {what}", where=plan, got="see TensorRT's log above")


def _clear(buffer: cuda.DeviceArray) -> None:
    buffer.copy_from(np.zeros(buffer.nbytes, np.uint8))


def _copy_in(address: int, host: NDArray[Any], stream: cuda.Stream) -> None:
    if host.nbytes:
        cuda.wrapper().memcpy(address, host.ctypes.data, host.nbytes, cuda.MemcpyKind.HostToDevice, stream.ptr)


def _read(buffer: cuda.DeviceArray, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """A copy on the host; bfloat16, which numpy does not know, becomes float32."""
    raw = np.empty(math.prod(shape) * _BYTES[dtype], np.uint8)
    buffer.copy_to(raw)
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return raw.view(_HOST_TYPES[dtype]).reshape(shape)

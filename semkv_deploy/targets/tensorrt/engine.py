"""Runs a bundle's TensorRT engines on a GPU, from nothing but their contract: caches on the device, appended in place.

A C++ or Triton host does the same: allocate what the contract says, give both names of an alias pair one address,
choose the optimization profile whose shapes fit, compress layer by layer into spare buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from polygraphy import cuda

from semkv_deploy.bundle.native_code import check_native_code
from semkv_deploy.errors import SemkvError
from semkv_deploy.passes.lower_native import FOLDED_ROWS
from semkv_deploy.targets.engine import NUMPY_TYPES as _HOST_TYPES
from semkv_deploy.targets.engine import Array, Feeds, run_sizes
from semkv_deploy.targets.tensorrt.api import TITLES, Runtime, find_gpu, runtime_module
from semkv_deploy.targets.tensorrt.plan_file import check_plan

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract, GraphContract, TensorContract
    from semkv_deploy.bundle.opened import OpenedBudget
    from semkv_deploy.methods.layout import Buffer

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


class TensorRTEngine:
    """The buffers of one session on a GPU, and the engines that work on them.

    Args:
        opened: the contract and its plan files.
        batch: rows; those that the engines were built for.

    Raises:
        SemkvError: when there are no engines, none for this batch or GPU, or one is damaged, of another version, or not
            what the contract says.
    """

    def __init__(self, opened: OpenedBudget, *, batch: int = 1) -> None:
        contract = opened.contract
        runtime = cast("Runtime", contract.target)
        check_native_code(opened.plugins, allowed=opened.allow_plugins, where=f"--target {runtime}")
        _check_runs_here(opened, batch)
        plans = {graph.name: opened.path(str(graph.plan)) for graph in contract.graphs}
        for plan in plans.values():
            check_plan(plan, runtime)
        self.opened, self.batch = opened, batch
        self._stream = cuda.Stream()
        trt = runtime_module(runtime)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._runtime.engine_host_code_allowed = opened.allow_plugins and bool(opened.plugins)
        self._engines = {
            graph.name: _Engine(
                self._runtime, plans[graph.name], opened.read(str(graph.plan)), graph, self._stream, TITLES[runtime]
            )
            for graph in contract.graphs
        }
        groups = range(len(contract.cache.groups))
        self._buffers = {
            buffer.name: [self._new(buffer, group) for group in groups] for buffer in contract.cache.buffers
        }
        # One set for each shape that groups have: groups are run one after the other.
        self._spare: dict[tuple[int, int], dict[str, cuda.DeviceArray]] = {}
        if contract.exchanged_buffers:
            for group in groups:
                if self._kind(group) not in self._spare:
                    self._spare[self._kind(group)] = {
                        name: self._new(self._buffer(name), group) for name in contract.exchanged_buffers
                    }

    @property
    def contract(self) -> Contract:
        return self.opened.contract

    def _kind(self, group: int) -> tuple[int, int]:
        """What decides the shapes of a group's buffers: heads and slots."""
        of = self.contract.cache.groups[group]
        return len(of.heads), of.capacity

    def _dtype(self, buffer: Buffer) -> str:
        return self.contract.dtype if buffer.dtype == "T" else buffer.dtype

    def _shape(self, buffer: Buffer, group: int) -> tuple[int, ...]:
        return buffer.sizes(self.contract.cache.groups[group], batch=self.batch, head_dim=self.contract.head_dim)

    def _new(self, buffer: Buffer, group: int) -> cuda.DeviceArray:
        array = cuda.DeviceArray.raw((math.prod(self._shape(buffer, group)) * _BYTES[self._dtype(buffer)],))
        _clear(array)
        return array

    def _buffer(self, name: str) -> Buffer:
        return next(buffer for buffer in self.contract.cache.buffers if buffer.name == name)

    def read(self, buffer: str, group: int) -> Array:
        of = self._buffer(buffer)
        return _read(self._buffers[buffer][group], self._shape(of, group), self._dtype(of))

    def write(self, buffer: str, group: int, array: Array) -> None:
        of = self._buffer(buffer)
        self._buffers[buffer][group].copy_from(_as_bytes(array, self._dtype(of)))

    def cache_bytes(self) -> int:
        spare = [array for each in self._spare.values() for array in each.values()]
        return sum(array.nbytes for arrays in (*self._buffers.values(), spare) for array in arrays)

    def reset(self, row: int | None = None) -> None:
        # What dead slots hold changes nothing, but what is said of slots is said of the next that lie there.
        for buffer in self.contract.cache.buffers:
            for array in self._buffers[buffer.name] if buffer.dtype == "float32" else []:
                if row is None:
                    _clear(array)
                else:
                    size = array.nbytes // self.batch
                    cuda.DeviceView(array.ptr + row * size, (size,), np.uint8).copy_from(np.zeros(size, np.uint8))

    def run(self, program: str, feeds: Feeds, *, row: int | None = None) -> dict[str, Array]:
        """Runs the decoder.

        Raises:
            SemkvError: when no optimization profile takes this many rows or tokens.
        """
        contract = self.contract
        sizes = run_sizes(feeds)
        engine, profile = self._choose(program, sizes, prompt=row is not None)
        groups = len(contract.cache.groups)
        addresses: dict[str, int] = {}
        for name, names in contract.programs[program].buffers.items():
            for group, buffer in enumerate(self._buffers[name]):
                source, result = names.names(group, groups)
                # Rows of a batch lie one after the other, heads within them.
                address = buffer.ptr + (row or 0) * (buffer.nbytes // self.batch)
                addresses |= {tensor: address for tensor in (source, result) if tensor is not None}
        outputs = engine.run(profile, sizes, feeds, addresses)
        return {name: _wide(array) for name, array in outputs.items()}

    def _choose(self, program: str, sizes: dict[str, int], *, prompt: bool) -> tuple[_Engine, int]:
        """The engine and the profile for a run; of those that fit, the one that is for it.

        A prompt of one token is a prompt: what attends to chosen slots in steps alone does so in no prompt.
        """
        wanted = "prefill" if prompt or sizes["sequence"] > 1 else "decode"
        found = [
            (phase != wanted, number, engine, profile)
            for number, graph in enumerate(self.contract.programs[program].graphs)
            for engine in [self._engines[graph.name]]
            for profile, phase in enumerate(engine.phases)
            if engine.fits(profile, sizes)
        ]
        if not found:
            raise SemkvError(
                "no engine takes a run of this shape",
                where=f"budget {self.contract.budget:g}, layout {self.contract.engine_layout}",
                expected=f"one row of at most {self.contract.prefill_chunk} tokens, or one token for each of "
                f"{self.batch} rows",
                got=f"{sizes['batch']} rows of {sizes['sequence']} tokens, {sizes['rows']} rows of logits",
            )
        _, _, engine, profile = min(found, key=lambda each: each[:2])
        return engine, profile

    def run_groups(self, program: str, feeds: Mapping[int, Feeds]) -> dict[int, dict[str, Array]]:
        contract = self.contract.programs[program]
        groups, results = len(self.contract.cache.groups), {}
        for group, given in feeds.items():
            graph = next(graph for graph in contract.graphs if group in graph.groups)
            spare = self._spare.get(self._kind(group), {})
            addresses: dict[str, int] = {}
            exchanged = []
            for name, binding in contract.buffers.items():
                source, result = binding.names(group, groups)
                if source is not None:
                    addresses[source] = self._buffers[name][group].ptr
                if result is not None:
                    in_place = source is None or graph.aliases.get(source) == result
                    addresses[result] = (self._buffers[name][group] if in_place else spare[name]).ptr
                    if not in_place:
                        exchanged.append(name)
            results[group] = self._engines[graph.name].run(0, {}, given, addresses)
            for name in exchanged:
                self._buffers[name][group], spare[name] = spare[name], self._buffers[name][group]
        return results


def _check_runs_here(opened: OpenedBudget, batch: int) -> None:
    contract = opened.contract
    where = f"--target {contract.target}"
    if any(graph.plan is None for graph in contract.graphs):
        raise SemkvError("no engines were built", where=where, fix="build the bundle without --no-engines")
    if batch != contract.batch:
        raise SemkvError(
            "the engines take another batch",
            where=where,
            expected=f"{contract.batch} rows",
            got=batch,
            fix=f"build the bundle with --batch {batch}",
        )
    gpu, _ = find_gpu()
    if gpu is not None and gpu.compute_capability not in opened.compute_capabilities:
        raise SemkvError(
            "the engines are for other GPUs",
            where=where,
            expected=" or ".join(f"SM{each}" for each in opened.compute_capabilities),
            got=f"SM{gpu.compute_capability} ({gpu.name})",
            fix=f"build the bundle with --compute-capability {gpu.compute_capability}",
        )


class _Engine:
    """One engine and its only execution context: profiles take turns in its activation memory."""

    def __init__(
        self, runtime: Any, plan: Path, content: bytes, graph: GraphContract, stream: cuda.Stream, title: str
    ) -> None:
        self.graph, self._stream, self._plan = graph, stream, plan
        self.phases: list[str] = [profile.phase for profile in graph.profiles] or [graph.phase]
        engine = runtime.deserialize_cuda_engine(content)
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
        feeds: Feeds,
        buffers: Mapping[str, int],
    ) -> dict[str, Array]:
        """Runs once and waits; returns the outputs that are no buffers.

        Args:
            profile: index of the optimization profile.
            sizes: of the symbols in the contract's shapes; a folded cache's rows follow from the batch.
            feeds: inputs on the host, by name; more than the graph has is fine.
            buffers: device address of the other inputs and outputs, by name.
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
                # Keep the host array alive until the copy ends.
                held.append(np.ascontiguousarray(np.reshape(feeds[tensor.name], shape), _HOST_TYPES[tensor.dtype]))
                address = self._on_device(tensor.name, held[-1].nbytes).ptr
                _copy_in(address, held[-1], stream)
            _require(context.set_tensor_address(tensor.name, address), f"take {tensor.name}", self._plan)
        results: dict[str, Array] = {}
        for tensor in self.graph.outputs:
            address = buffers.get(tensor.name)
            if address is None:
                result = np.empty(_shape(tensor, sizes), _HOST_TYPES[tensor.dtype])
                address = self._on_device(tensor.name, result.nbytes).ptr
                results[tensor.name] = result
            _require(context.set_tensor_address(tensor.name, address), f"take {tensor.name}", self._plan)
        _require(context.execute_async_v3(stream.ptr), "run", self._plan)
        for name, result in results.items():
            cuda.DeviceView(self._small[name].ptr, result.shape, result.dtype).copy_to(result, stream)
        stream.synchronize()
        return results

    def _on_device(self, name: str, size: int) -> cuda.DeviceArray:
        """A buffer of at least `size` bytes that stays until a larger one is asked for."""
        if name not in self._small or self._small[name].nbytes < size:
            self._small[name] = cuda.DeviceArray.raw((max(size, 1),))
        return self._small[name]


def _shape(tensor: TensorContract, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape in a run; the first axis of a folded cache is batch x KV heads."""
    return tuple(_size(size, sizes) if isinstance(size, str) else size for size in tensor.shape)


def _size(symbol: str, sizes: Mapping[str, int]) -> int:
    if symbol.startswith(FOLDED_ROWS):
        return sizes["batch"] * int(symbol.removeprefix(FOLDED_ROWS))
    return sizes[symbol]


def _wide(array: Array) -> Array:
    """Logits in float32, whatever the engine computes them in."""
    return array.astype(np.float32, copy=False) if array.dtype == np.float16 else array


def _require(done: bool, what: str, plan: Path) -> None:
    if not done:
        raise SemkvError(f"the engine does not {what}", where=plan, got="see TensorRT's log above")


def _clear(buffer: cuda.DeviceArray) -> None:
    buffer.copy_from(np.zeros(buffer.nbytes, np.uint8))


def _copy_in(address: int, host: Array, stream: cuda.Stream) -> None:
    if host.nbytes:
        cuda.wrapper().memcpy(address, host.ctypes.data, host.nbytes, cuda.MemcpyKind.HostToDevice, stream.ptr)


def _read(buffer: cuda.DeviceArray, shape: tuple[int, ...], dtype: str) -> Array:
    """A copy on the host; bfloat16, which numpy does not know, becomes float32."""
    raw = np.empty(math.prod(shape) * _BYTES[dtype], np.uint8)
    buffer.copy_to(raw)
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return raw.view(_HOST_TYPES[dtype]).reshape(shape)


def _as_bytes(array: Array, dtype: str) -> Array:
    """The bytes of an array in a type; to bfloat16 from float32 by truncation, exact for what `_read` gave."""
    if dtype == "bfloat16":
        wide = np.ascontiguousarray(array, np.float32).view(np.uint32)
        return (wide >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    return np.ascontiguousarray(array, _HOST_TYPES[dtype]).view(np.uint8).reshape(-1)

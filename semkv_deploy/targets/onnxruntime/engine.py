"""Runs a contract's graphs in ONNX Runtime: caches appended in place, groups compressed into spare buffers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.bundle.files import let_go
from semkv_deploy.bundle.graphs import LoadedGraph
from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.products import FLOAT32_BLOCKS
from semkv_deploy.methods.layout import DECODE
from semkv_deploy.targets.engine import NUMPY_TYPES, Array, Feeds, graph_for, run_sizes, shape_of
from semkv_deploy.targets.onnxruntime.native import required_library
from semkv_deploy.targets.onnxruntime.threads import usable_cpus

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract, GraphContract
    from semkv_deploy.bundle.opened import OpenedBudget


BFLOAT16 = 16
"""ONNX's number of the type."""

CACHE_LINE = 64
"""Bytes."""

MOST_STEPS = 4
"""Bindings of steps that are held, by the rows that are run: rows change when a turn begins or ends."""

STOP_SPINNING = ("session.force_spinning_stop", "1")
"""Threads of a session stop waiting for work in a loop when its run ends: what runs next, groups side by side for one,
has the cores to itself."""

GROUP_WORKERS = 2
"""Groups that a program runs for at the same time at most; each takes one set of spare buffers."""


def onnxruntime() -> Any:
    """The `onnxruntime` module.

    Raises:
        SemkvError: when it is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise SemkvError(
            "ONNX Runtime is not installed",
            where="target onnxruntime-cpu",
            fix="install it with: pip install 'semkv-deploy[cpu]'",
        ) from None
    return ort


def inference_session(
    graph: Path | LoadedGraph,
    *,
    threads: int | None = None,
    provider: str = "CPUExecutionProvider",
    native: int | None = None,
) -> Any:
    """An `InferenceSession` with settings for cache graphs.

    Args:
        graph: a file, whose external data ONNX Runtime maps; or a bundle's graph, whose weights it reads where they
            lie: in a private copy that nobody can truncate.
        threads: None: one for each CPU that this process may use.
        native: version of the library whose operators the graph has; None: it has none of them.

    Raises:
        SemkvError: when ONNX Runtime cannot load the graph, or there is no such library.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry(*FLOAT32_BLOCKS)
    options.add_session_config_entry(*STOP_SPINNING)
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cpus()
    if native is not None:
        options.register_custom_ops_library(str(required_library(native)))
    # Shapes differ from run to run, so a memory plan of the first run is only ballast.
    options.enable_mem_pattern = False
    try:
        if isinstance(graph, Path):
            return ort.InferenceSession(str(graph), options, providers=[provider])
        if graph.data:
            options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
            options.add_external_initializers_from_files_in_memory(
                list(graph.data), list(graph.data.values()), [len(content) for content in graph.data.values()]
            )
        session = ort.InferenceSession(graph.model, options, providers=[provider])
        # The weights must outlive the session.
        session.semkv_graph = graph
        for content in graph.data.values():
            # Most of them were packed into buffers of ONNX Runtime's own while it loaded.
            let_go(content)
        return session
    except Exception as error:
        raise SemkvError(
            f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0]}",
            where=Path(graph.name).name,
            fix="build the bundle again with this version of onnxruntime",
        ) from error


class OnnxRuntimeEngine:
    """The buffers of one session, and the graphs that work on them.

    Args:
        opened: the contract and its files.
        batch: rows of the buffers.
        in_place: bind each cache to the decoder's input and output alike; False keeps a second set of buffers and
            is there to check that both give the same.
        threads: intra-op threads; None: one for each CPU that this process may use.

    Raises:
        SemkvError: when the batch is not the contract's, or ONNX Runtime takes a graph or a cache type not.
    """

    def __init__(
        self, opened: OpenedBudget, *, batch: int = 1, in_place: bool = True, threads: int | None = None
    ) -> None:
        contract = opened.contract
        if batch < 1 or batch != (contract.batch or batch):
            raise SemkvError("the graphs take another batch", where="batch", expected=contract.batch or 1, got=batch)
        if contract.dtype not in NUMPY_TYPES and contract.native is None:
            raise SemkvError(
                "ONNX Runtime's own CPU kernels do not take this cache type",
                where="past_key_values.00.key",
                expected="float32, float16, or native operators",
                got=contract.dtype,
            )
        self.opened, self.batch, self.in_place = opened, batch, in_place
        # A group's program is many small operators: groups side by side on one thread each are nearly twice as fast as
        # one after the other on all threads.
        self._workers = max(1, min(GROUP_WORKERS, threads or usable_cpus()))
        self._sessions = {
            graph.name: inference_session(
                opened.graph(graph.onnx),
                threads=threads if program.scope == "cache" else 1,
                native=contract.native,
            )
            for program in contract.programs.values()
            for graph in program.graphs
        }
        self._buffers = {
            buffer.name: [self._new(buffer.name, group) for group in range(len(contract.cache.groups))]
            for buffer in contract.cache.buffers
        }
        # np.zeros maps pages on first touch: slots never used cost no memory.
        self._spare: dict[tuple[int, int], list[dict[str, Array]]] = defaultdict(list)
        if contract.exchanged_buffers:
            for group, kind in enumerate(self._kinds()):
                if not self._spare[kind]:
                    count = min(self._workers, self._kinds().count(kind))
                    self._spare[kind] = [self._new_set(group) for _ in range(count)]
        self._values: dict[int, Any] = {}
        """OrtValues of buffers, by the identity of their arrays, which live as long as this."""
        self._steps: dict[tuple[int, int], _Binding] = {}
        """By their rows: the first, and how many."""

    @property
    def contract(self) -> Contract:
        return self.opened.contract

    def _kinds(self) -> list[tuple[int, int]]:
        """By group, what decides the shapes of its buffers: heads and slots."""
        return [(len(group.heads), group.capacity) for group in self.contract.cache.groups]

    def _new(self, name: str, group: int) -> Array:
        buffer = next(buffer for buffer in self.contract.cache.buffers if buffer.name == name)
        shape = buffer.sizes(self.contract.cache.groups[group], batch=self.batch, head_dim=self.contract.head_dim)
        return _aligned_zeros(shape, _array_type(self.contract.dtype if buffer.dtype == "T" else buffer.dtype))

    def _new_set(self, group: int) -> dict[str, Array]:
        return {name: self._new(name, group) for name in self.contract.exchanged_buffers}

    def read(self, buffer: str, group: int) -> Array:
        array = self._buffers[buffer][group]
        return array.astype(np.float32) if array.dtype == _array_type("bfloat16") else array

    def write(self, buffer: str, group: int, array: Array) -> None:
        self._buffers[buffer][group][:] = array

    def cache_bytes(self) -> int:
        spare = [array for sets in self._spare.values() for each in sets for array in each.values()]
        return sum(array.nbytes for arrays in (*self._buffers.values(), spare) for array in arrays)

    def reset(self, row: int | None = None) -> None:
        # What dead slots hold changes nothing, but what is said of slots is said of the next that lie there.
        for buffer in self.contract.cache.buffers:
            for array in self._buffers[buffer.name] if buffer.dtype == "float32" else []:
                array[slice(None) if row is None else row] = 0

    def run(self, program: str, feeds: Feeds, *, row: int | None = None) -> dict[str, Array]:
        tokens = feeds["input_ids"].shape[1]
        if program == DECODE and row is None and tokens == 1:
            return self.run_rows(program, feeds, 0)
        graph = graph_for(self.contract.programs[program].graphs, prompt=row is not None or tokens > 1)
        rows = slice(None) if row is None else slice(row, row + 1)
        return _Binding(self, program, graph, rows, feeds).run(feeds)

    def run_rows(self, program: str, feeds: Feeds, first: int) -> dict[str, Array]:
        count = len(feeds["input_ids"])
        step = self._steps.get((first, count))
        if step is None or not step.fits(feeds):
            while len(self._steps) >= MOST_STEPS:
                del self._steps[next(iter(self._steps))]
            graph = graph_for(self.contract.programs[program].graphs, prompt=False)
            step = self._steps[first, count] = _Binding(self, program, graph, slice(first, first + count), feeds)
        return step.run(feeds)

    def run_groups(self, program: str, feeds: Mapping[int, Feeds]) -> dict[int, dict[str, Array]]:
        if not all(graph.aliases for graph in self.contract.programs[program].graphs):
            # Buffers are exchanged.
            self._steps.clear()
        with ThreadPoolExecutor(self._workers) as pool:
            results = pool.map(lambda group: self._run_group(program, group, feeds[group]), feeds)
            return dict(zip(feeds, results, strict=True))

    def _run_group(self, program: str, group: int, feeds: Feeds) -> dict[str, Array]:
        contract = self.contract.programs[program]
        graph = next(graph for graph in contract.graphs if group in graph.groups)
        session, groups = self._sessions[graph.name], len(self.contract.cache.groups)
        kind = self._kinds()[group]
        # As many sets of spare buffers as workers, or as groups of the kind: there is always one.
        spare = self._spare[kind].pop() if self._spare[kind] else {}
        given, results = dict(feeds), {}
        exchanged, own = [], set[int]()
        for name, binding in contract.buffers.items():
            source, result = binding.names(group, groups)
            if source is not None:
                given[source] = self._buffers[name][group]
                own.add(id(given[source]))
            if result is not None:
                in_place = source is None or graph.aliases.get(source) == result
                results[result] = self._buffers[name][group] if in_place else spare[name]
                if not in_place:
                    exchanged.append(name)
        run = session.io_binding()
        held = []
        for tensor in graph.inputs:
            array = given[tensor.name]
            held.append(self._value(array) if id(array) in own else _ort_value(np.ascontiguousarray(array)))
            run.bind_ortvalue_input(tensor.name, held[-1])
        for tensor in graph.outputs:
            if tensor.name in results:
                held.append(self._value(results[tensor.name]))
                run.bind_ortvalue_output(tensor.name, held[-1])
            else:
                run.bind_output(tensor.name)
        session.run_with_iobinding(run)
        for name in exchanged:
            self._buffers[name][group], spare[name] = spare[name], self._buffers[name][group]
        self._spare[kind].append(spare)
        outputs = zip(graph.outputs, run.get_outputs(), strict=True)
        return {tensor.name: value.numpy() for tensor, value in outputs if tensor.name not in results}

    def _value(self, array: Array) -> Any:
        """A buffer's OrtValue, made once: a group's program takes little longer than to make a dozen of them."""
        if id(array) not in self._values:
            self._values[id(array)] = _ort_value(array)
        return self._values[id(array)]


class _Binding:
    """A decoder's inputs and outputs bound to buffers once, for runs of one shape."""

    def __init__(
        self, engine: OnnxRuntimeEngine, program: str, graph: GraphContract, rows: slice, feeds: Feeds
    ) -> None:
        contract = engine.contract
        self._session = engine._sessions[graph.name]
        self._binding = self._session.io_binding()
        # An OrtValue over a numpy buffer shares it, and must outlive the binding.
        self._held: list[Any] = []
        self._copies: list[tuple[Array, Array]] = []
        bound: set[str] = set()

        def bind(name: str, array: Array, *, output: bool = False) -> None:
            value = _ort_value(array)
            self._held.append(value)
            bound.add(name)
            (self._binding.bind_ortvalue_output if output else self._binding.bind_ortvalue_input)(name, value)

        inputs = {tensor.name: tensor for tensor in graph.inputs}
        outputs = {tensor.name: tensor for tensor in graph.outputs}
        groups = len(contract.cache.groups)
        for name, names in contract.programs[program].buffers.items():
            for group in range(groups):
                source, result = names.names(group, groups)
                if source not in inputs and result not in outputs:
                    continue
                buffer = _as_viewed(
                    engine._buffers[name][group][rows], (inputs.get(source or "") or outputs[result or ""]).shape
                )
                if source in inputs:
                    bind(str(source), buffer)
                if result in outputs:
                    appended = buffer
                    if not engine.in_place:
                        appended = np.zeros_like(buffer)
                        self._copies.append((buffer, appended))
                    bind(str(result), appended, output=True)
        self._small = {
            name: np.zeros(feeds[name].shape, NUMPY_TYPES[tensor.dtype])
            for name, tensor in inputs.items()
            if name not in bound
        }
        for name, array in self._small.items():
            bind(name, array)
        sizes = run_sizes(feeds)
        self._results = {
            name: np.zeros(shape_of(tensor, sizes), NUMPY_TYPES[tensor.dtype])
            for name, tensor in outputs.items()
            if name not in bound
        }
        for name, array in self._results.items():
            bind(name, array, output=True)

    def fits(self, feeds: Feeds) -> bool:
        """Whether a run's inputs have the shapes that are bound."""
        return all(feeds[name].shape == array.shape for name, array in self._small.items())

    def run(self, feeds: Feeds) -> dict[str, Array]:
        for name, array in self._small.items():
            array[:] = feeds[name]
        self._session.run_with_iobinding(self._binding)
        for buffer, appended in self._copies:
            buffer[:] = appended
        return self._results


def _aligned_zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros that begin with a cache line: a row that is read by itself then lies in as few of them as it can."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    zeros: Array = memory[begin : begin + size].view(dtype).reshape(shape)
    return zeros


def _array_type(dtype: str) -> Any:
    """NumPy's type of a buffer; bfloat16 is of the package that onnx uses."""
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.int8 if dtype == "int8" else NUMPY_TYPES[dtype]


def _ort_value(array: Array) -> Any:
    """An OrtValue over an array's memory."""
    values = onnxruntime().OrtValue
    if array.dtype != _array_type("bfloat16"):
        return values.ortvalue_from_numpy(array)
    return values.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)


def _as_viewed(buffer: Array, shape: tuple[int | str, ...]) -> Array:
    """A buffer's bytes in the shape that a graph has for them: heads may lie in the batch axis."""
    if len(shape) == buffer.ndim and shape[1] == buffer.shape[1]:
        return buffer
    return buffer.reshape(-1, *(size for size in shape[1:] if isinstance(size, int)))

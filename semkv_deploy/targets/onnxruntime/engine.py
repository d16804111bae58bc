"""Runs a contract's graphs in ONNX Runtime: caches appended in place, groups compressed into spare buffers.

Where buffers lie, and what runs the graphs, the target's `Place` says: this process's memory, or a GPU's.
"""

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
from semkv_deploy.targets.onnxruntime.buffers import Binding
from semkv_deploy.targets.onnxruntime.place import HOST, place_of
from semkv_deploy.targets.onnxruntime.threads import usable_cpus

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract, GraphContract
    from semkv_deploy.bundle.opened import OpenedBudget
    from semkv_deploy.targets.onnxruntime.buffers import Buffer
    from semkv_deploy.targets.onnxruntime.place import Place


MOST_STEPS = 4
"""Bindings of steps that are held, by the rows that are run: rows change when a turn begins or ends."""

STOP_SPINNING = ("session.force_spinning_stop", "1")
"""Threads of a session stop waiting for work in a loop when its run ends: what runs next, groups side by side for one,
has the cores to itself."""


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
    place: Place = HOST,
    native: int | None = None,
) -> Any:
    """An `InferenceSession` with settings for cache graphs.

    Args:
        graph: a file, whose external data ONNX Runtime maps; or a bundle's graph, whose weights it reads where they
            lie: in a private copy that nobody can truncate.
        threads: None: one for each CPU that this process may use.
        place: where it runs.
        native: version of the library whose operators the graph has; None: it has none of them.

    Raises:
        SemkvError: when ONNX Runtime cannot load the graph, or has no such provider, or there is no such library.
    """
    ort = onnxruntime()
    place.check()
    options = ort.SessionOptions()
    options.add_session_config_entry(*FLOAT32_BLOCKS)
    options.add_session_config_entry(*STOP_SPINNING)
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cpus()
    if native is not None:
        options.register_custom_ops_library(str(place.library(native)))
    # Shapes differ from run to run, so a memory plan of the first run is only ballast.
    options.enable_mem_pattern = False
    providers = [(place.provider, dict(place.options))]
    try:
        if isinstance(graph, Path):
            return _on(place, ort.InferenceSession(str(graph), options, providers=providers))
        if graph.data:
            options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
            options.add_external_initializers_from_files_in_memory(
                list(graph.data), list(graph.data.values()), [len(content) for content in graph.data.values()]
            )
        session = _on(place, ort.InferenceSession(graph.model, options, providers=providers))
        # The weights must outlive the session.
        session.semkv_graph = graph
        for content in graph.data.values():
            # Most of them were packed into buffers of ONNX Runtime's own while it loaded.
            let_go(content)
        return session
    except SemkvError:
        raise
    except Exception as error:
        raise SemkvError(
            f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0]}",
            where=Path(graph.name).name,
            fix="build the bundle again with this version of onnxruntime",
        ) from error


def _on(place: Place, session: Any) -> Any:
    """The session, if it has the provider: ONNX Runtime goes on without one that finds no device."""
    if place.provider not in session.get_providers():
        raise SemkvError(
            f"ONNX Runtime made a session without {place.provider}",
            where=f"target {place.target}",
            expected="an NVIDIA GPU, its driver, and the CUDA and cuDNN that onnxruntime-gpu is for",
            got=", ".join(session.get_providers()),
            fix="see what onnxruntime.InferenceSession prints, or build for onnxruntime-cpu",
        )
    return session


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
        self.place = place_of(contract.target)
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
        # A group's program is many small operators: on a CPU groups side by side on one thread each are nearly twice as
        # fast as one after the other on all threads.
        self._workers = max(1, min(self.place.workers, threads or usable_cpus()))
        self._sessions = {
            graph.name: inference_session(
                opened.graph(graph.onnx),
                threads=threads if program.scope == "cache" else 1,
                place=self.place,
                native=contract.native,
            )
            for program in contract.programs.values()
            for graph in program.graphs
        }
        self._buffers = {
            buffer.name: [self._new(buffer.name, group) for group in range(len(contract.cache.groups))]
            for buffer in contract.cache.buffers
        }
        self._spare: dict[tuple[int, int], list[dict[str, Buffer]]] = defaultdict(list)
        if contract.exchanged_buffers:
            for group, kind in enumerate(self._kinds()):
                if not self._spare[kind]:
                    count = min(self._workers, self._kinds().count(kind))
                    self._spare[kind] = [self._new_set(group) for _ in range(count)]
        self._steps: dict[tuple[int, int], _DecoderBinding] = {}
        """By their rows: the first, and how many."""

    @property
    def contract(self) -> Contract:
        return self.opened.contract

    def _kinds(self) -> list[tuple[int, int]]:
        """By group, what decides the shapes of its buffers: heads and slots."""
        return [(len(group.heads), group.capacity) for group in self.contract.cache.groups]

    def _new(self, name: str, group: int) -> Buffer:
        buffer = next(buffer for buffer in self.contract.cache.buffers if buffer.name == name)
        shape = buffer.sizes(self.contract.cache.groups[group], batch=self.batch, head_dim=self.contract.head_dim)
        return self.place.buffer(shape, self.contract.dtype if buffer.dtype == "T" else buffer.dtype)

    def _new_set(self, group: int) -> dict[str, Buffer]:
        return {name: self._new(name, group) for name in self.contract.exchanged_buffers}

    def read(self, buffer: str, group: int) -> Array:
        found = self._buffers[buffer][group]
        return found.numpy().astype(np.float32) if found.dtype == "bfloat16" else found.numpy()

    def write(self, buffer: str, group: int, array: Array) -> None:
        self._buffers[buffer][group].fill(slice(None), array)

    def cache_bytes(self) -> int:
        spare = [buffer for sets in self._spare.values() for each in sets for buffer in each.values()]
        return sum(buffer.nbytes for buffers in (*self._buffers.values(), spare) for buffer in buffers)

    def reset(self, row: int | None = None) -> None:
        # What dead slots hold changes nothing, but what is said of slots is said of the next that lie there.
        rows = slice(None) if row is None else slice(row, row + 1)
        for kind in self.contract.cache.buffers:
            for buffer in self._buffers[kind.name] if kind.dtype == "float32" else []:
                buffer.fill(rows, 0)

    def run(self, program: str, feeds: Feeds, *, row: int | None = None) -> dict[str, Array]:
        tokens = feeds["input_ids"].shape[1]
        if program == DECODE and row is None and tokens == 1:
            return self.run_rows(program, feeds, 0)
        graph = graph_for(self.contract.programs[program].graphs, prompt=row is not None or tokens > 1)
        rows = slice(None) if row is None else slice(row, row + 1)
        return _DecoderBinding(self, program, graph, rows, feeds).run(feeds)

    def run_rows(self, program: str, feeds: Feeds, first: int) -> dict[str, Array]:
        count = len(feeds["input_ids"])
        step = self._steps.get((first, count))
        if step is None or not step.fits(feeds):
            while len(self._steps) >= MOST_STEPS:
                del self._steps[next(iter(self._steps))]
            graph = graph_for(self.contract.programs[program].graphs, prompt=False)
            rows = slice(first, first + count)
            step = self._steps[first, count] = _DecoderBinding(self, program, graph, rows, feeds)
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
        sources: dict[str, Buffer] = {}
        results: dict[str, Buffer] = {}
        exchanged = []
        for name, binding in contract.buffers.items():
            source, result = binding.names(group, groups)
            buffer = self._buffers[name][group]
            if source is not None:
                sources[source] = buffer
            if result is not None:
                in_place = source is None or graph.aliases.get(source) == result
                results[result] = buffer if in_place else spare[name]
                if not in_place:
                    exchanged.append(name)
        run = self.binding(session)
        for tensor in graph.inputs:
            if tensor.name in sources:
                run.buffer(tensor.name, sources[tensor.name], output=False)
            else:
                run.input(tensor.name, np.ascontiguousarray(feeds[tensor.name]))
        for tensor in graph.outputs:
            if tensor.name in results:
                run.buffer(tensor.name, results[tensor.name], output=True)
            else:
                run.new_output(tensor.name)
        run.run()
        for name in exchanged:
            self._buffers[name][group], spare[name] = spare[name], self._buffers[name][group]
        self._spare[kind].append(spare)
        outputs = zip(graph.outputs, run.outputs(), strict=True)
        return {tensor.name: value.numpy() for tensor, value in outputs if tensor.name not in results}

    def binding(self, session: Any) -> Binding:
        """A new binding of a graph that runs here."""
        return Binding(session, copies_inputs=self.place.device is not None)


class _DecoderBinding:
    """A decoder's inputs and outputs bound to buffers once, for runs of one shape."""

    def __init__(
        self, engine: OnnxRuntimeEngine, program: str, graph: GraphContract, rows: slice, feeds: Feeds
    ) -> None:
        contract = engine.contract
        self._binding = engine.binding(engine._sessions[graph.name])
        self._rows = rows
        self._copies: list[tuple[Buffer, Buffer]] = []
        bound: set[str] = set()
        inputs = {tensor.name: tensor for tensor in graph.inputs}
        outputs = {tensor.name: tensor for tensor in graph.outputs}
        groups = len(contract.cache.groups)
        for name, names in contract.programs[program].buffers.items():
            for group in range(groups):
                source, result = names.names(group, groups)
                buffer = engine._buffers[name][group]
                if source in inputs:
                    self._binding.buffer(source, buffer, output=False, rows=rows, shape=inputs[source].shape)
                    bound.add(source)
                if result in outputs:
                    appended = buffer
                    if not engine.in_place:
                        appended = engine.place.buffer(buffer.shape, buffer.dtype)
                        self._copies.append((buffer, appended))
                    self._binding.buffer(result, appended, output=True, rows=rows, shape=outputs[result].shape)
                    bound.add(result)
        self._small = {
            name: np.zeros(feeds[name].shape, NUMPY_TYPES[tensor.dtype])
            for name, tensor in inputs.items()
            if name not in bound
        }
        for name, array in self._small.items():
            self._binding.input(name, array)
        sizes = run_sizes(feeds)
        self._results = {
            name: np.zeros(shape_of(tensor, sizes), NUMPY_TYPES[tensor.dtype])
            for name, tensor in outputs.items()
            if name not in bound
        }
        for name, array in self._results.items():
            self._binding.output(name, array)

    def fits(self, feeds: Feeds) -> bool:
        """Whether a run's inputs have the shapes that are bound."""
        return all(feeds[name].shape == array.shape for name, array in self._small.items())

    def run(self, feeds: Feeds) -> dict[str, Array]:
        for name, array in self._small.items():
            array[:] = feeds[name]
        self._binding.run()
        for buffer, appended in self._copies:
            buffer.fill(self._rows, appended.numpy()[self._rows])
        return self._results

"""What of a bundle can be compared on this machine, with what, and within which tolerance."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.bundle import TensorRTRecord
from semkv_deploy.bundle.contract import graph_contract
from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.aliases import alias_map, check_alias_safety
from semkv_deploy.model.names import REFERENCE_QUERIES
from semkv_deploy.targets import TO_RUN, open_engine
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine
from semkv_deploy.validate import weights
from semkv_deploy.validate.compare import AS_SHIPPED, CACHES, FITTED, FLOAT16, INT8

if TYPE_CHECKING:
    from collections.abc import Mapping

    from semkv_deploy.bundle import BudgetRecord, Bundle, OnnxRuntimeRecord, OpenedBudget
    from semkv_deploy.bundle.contract import GraphContract
    from semkv_deploy.targets.engine import Engine

STRICT = "same weights, float32"

BATCH = 2
"""Rows of a scenario where a target leaves the batch open; they are ragged."""


class Graphs(NamedTuple):
    """What is run: a budget's contract and files, and how.

    Attributes:
        opened: the contract; its graphs may be rewritten ones, outside the bundle.
        in_place: bind each cache to the decoder's input and output alike, or copy.
        engines: run the engines on the GPU; else the graphs in ONNX Runtime, whatever the target.
    """

    opened: OpenedBudget
    in_place: bool
    engines: bool = False

    @property
    def decoders(self) -> tuple[Path, ...]:
        """Files of the decoder's graphs."""
        return tuple(self.opened.path(graph.onnx) for graph in self.opened.contract.decoders)

    def open(self, batch: int) -> Engine:
        """An engine on them."""
        if self.engines:
            return open_engine(self.opened, batch=batch)
        return OnnxRuntimeEngine(self.opened, batch=batch, in_place=self.in_place)

    def with_files(self, files: Mapping[str, Path], dtype: str | None = None) -> Graphs:
        """The same with other graphs in place of some, by name; `dtype`: of their caches, where that is another."""
        import onnx

        def replaced(graph: GraphContract) -> GraphContract:
            if graph.name not in files:
                return graph
            path = files[graph.name]
            model = onnx.load(path, load_external_data=False)
            return graph_contract(model, graph.name, graph.phase, str(path), groups=graph.groups, aliases=graph.aliases)

        contract = self.opened.contract
        if dtype is not None:
            contract = contract.model_copy(update={"dtype": dtype})
        for name, program in contract.programs.items():
            contract = contract.with_graphs(name, [replaced(graph) for graph in program.graphs])
        return self._replace(opened=dataclasses.replace(self.opened, contract=contract))

    def with_decoder(self, path: Path | None) -> Graphs:
        """The same with another decoder for prompts and steps (None: as it is)."""
        if path is None:
            return self
        (decoder,) = self.opened.contract.decoders
        return self.with_files({decoder.name: path})


@dataclass
class Check:
    """One comparison.

    Attributes:
        target, name: of what is checked, such as "onnxruntime-cpu" and "in place".
        tolerance: key of `compare.TOLERANCES`; "" for a check that compares no runs.
        graphs: what runs; None: nothing does.
        reference: the decoder it is compared with, when that is not the portable one.
        pair: names of two other checks of the target whose runs are compared with each other.
        batch: rows.
        ran: the bundle's files that run, and what was done to them.
        optional: a graph that this machine has no kernels for is skipped, not failed.
        failed: why it fails without being run.
        skipped: why it is not run.
        passed: what was shown without running.
    """

    target: str
    name: str
    tolerance: str = ""
    graphs: Graphs | None = None
    reference: Path | None = None
    pair: tuple[str, str] | None = None
    batch: int = BATCH
    ran: str = ""
    optional: bool = False
    failed: str | None = None
    skipped: str | None = None
    passed: str | None = None


def reference_graphs(bundle: Bundle, budget: float) -> Graphs:
    """The portable graphs: function bodies in float32, caches copied.

    Raises:
        SemkvError: when the bundle was built without them.
    """
    return Graphs(bundle.portable(budget), in_place=False)


def checks(bundle: Bundle, budget: float, target: str, folder: Path) -> list[Check]:
    """The checks of one target at one budget; graphs rewritten for them are written to `folder`."""
    record = bundle.target(target)
    built = next((built for built in record.budgets if built.contract.budget == budget), None)
    if built is None:
        return [Check(target, "graphs", skipped="not run: the target was not built for this budget")]
    graphs = Graphs(bundle.built(target, budget), in_place=True)
    portable = reference_graphs(bundle, budget).decoders[0]
    if isinstance(record, TensorRTRecord):
        return _tensorrt(graphs, portable, target, record, built, folder)
    return _onnxruntime(graphs, portable, target, record, folder)


def _onnxruntime(in_place: Graphs, portable: Path, target: str, record: OnnxRuntimeRecord, folder: Path) -> list[Check]:
    copying = in_place._replace(in_place=False)
    (graph,), (decoder,) = in_place.opened.contract.decoders, in_place.decoders
    found = [_aliases(target, "aliases", decoder, graph.aliases)]
    if lacking := TO_RUN[target]():
        return [*found, Check(target, "in place", skipped=f"not run: {lacking}")]
    contract = in_place.opened.contract
    dtype, fitted = contract.dtype, any(buffer.name == REFERENCE_QUERIES for buffer in contract.cache.buffers)
    strict = FITTED if fitted and contract.native is not None else STRICT
    if record.weights == "fp32":
        tolerance = strict
        if dtype != "float32":
            found.append(Check(target, "float32 caches", strict, _with_float32_caches(in_place, portable, folder)))
            tolerance = CACHES[dtype]
        found += [Check(target, "in place", tolerance, in_place), Check(target, "copying", tolerance, copying)]
    else:
        try:
            shipped: Path | None = None
            if record.weights == "kept":
                # Both round activations as the file they came in does: by scales of its own, not only by the last bit.
                reference = weights.with_float32_activations(portable, folder, "reference.onnx")
            else:
                reference = shipped = weights.with_target_weights(portable, decoder, folder)
        except SemkvError as error:
            return [*found, Check(target, "weights", failed=str(error))]
        exact = in_place.with_decoder(weights.with_float32_activations(decoder, folder, "float32_activations.onnx"))
        if dtype != "float32":
            exact = _with_float32_caches(exact, portable, folder)
        found += [
            Check(target, "weights", passed=_of_weights(record)),
            Check(target, "float32 activations", strict, exact, reference),
            Check(target, "in place", INT8, in_place, shipped),
            Check(target, "copying", INT8, copying, shipped),
        ]
    return [*found, Check(target, "in place = copying", "same arithmetic", pair=("in place", "copying"))]


def _of_weights(record: OnnxRuntimeRecord) -> str:
    if record.weights == "kept":
        return "both graphs have the weights as they came"
    return f"{record.weights} weights are the model's, rounded"


def _with_float32_caches(graphs: Graphs, portable: Path, folder: Path) -> Graphs:
    """The same graphs with float32 caches: what is left to differ is not rounding."""
    contract = graphs.opened.contract
    (decoder,) = contract.decoders
    files = {decoder.name: weights.with_float32_caches(graphs.opened.path(decoder.onnx), folder)}
    # Compressors are the portable ones, widened and narrowed around.
    files |= {graph.name: portable.parent / Path(graph.onnx).name for graph in contract.compressors}
    return graphs.with_files(files, "float32")


def _tensorrt(
    graphs: Graphs, portable: Path, target: str, record: TensorRTRecord, built: BudgetRecord, folder: Path
) -> list[Check]:
    """The graphs that engines were built from, run in ONNX Runtime as a host runs the engines; then the engines."""
    contract, batch = built.contract, built.contract.batch or BATCH
    paths = {graph.name: graphs.opened.path(graph.onnx) for graph in contract.graphs}
    phases = [graph.phase for graph in contract.decoders]
    found = [
        _aliases(target, f"{graph.phase} aliases", paths[graph.name], graph.aliases) for graph in contract.decoders
    ]
    reference: Path | None = None
    if record.dtype != "float32":
        try:
            reference = weights.with_target_weights(portable, graphs.decoders[0], folder)
        except SemkvError as error:
            return [*found, Check(target, "weights", failed=str(error))]
        found.append(Check(target, "weights", passed=f"{record.dtype} weights are the model's, rounded"))
    ran = ", ".join(graph.onnx for graph in contract.graphs)
    shipped = graphs
    if record.plugins:
        ran += f"; plugin nodes ({', '.join(record.plugins)}) as their operators' bodies, the plugins are not run"
        paths = {name: weights.with_function_bodies(path, folder) for name, path in paths.items()}
        shipped = graphs.with_files(paths)
    name = f"{' and '.join(phases)} graph{'s' if len(phases) > 1 else ''}"
    if reference is None:
        found.append(Check(target, name, STRICT, shipped, batch=batch, ran=ran))
    else:
        exact = shipped.with_files({n: weights.in_float32(path, folder) for n, path in paths.items()}, "float32")
        found.append(
            Check(target, f"{name} in float32", STRICT, exact, reference, batch=batch, ran=f"{ran}; all in float32")
        )
    if record.dtype == "float16":
        found.append(
            Check(target, f"{name} in float16", FLOAT16, shipped, reference, batch=batch, ran=ran, optional=True)
        )
    return [*found, _engines(target, record, graphs, batch, reference)]


def _engines(target: str, record: TensorRTRecord, graphs: Graphs, batch: int, reference: Path | None) -> Check:
    """The engines themselves, where they run."""
    plans = [graph.plan for graph in graphs.opened.contract.graphs if graph.plan is not None]
    gap = TO_RUN[target]() if plans else "no engines were built"
    if gap is None and record.plugins and not graphs.opened.allow_plugins:
        gap = "the engines carry native code (give --allow-plugins if you trust it)"
    if gap is not None:
        bodies = f", with the bodies of {', '.join(record.plugins)} in place of the plugins" if record.plugins else ""
        return Check(target, "engines", skipped=f"not run: {gap}; their graphs are checked here{bodies}")
    # What they round is not what ONNX Runtime rounds, in float32 either: the graphs beside them are checked strictly.
    tolerance, engines = AS_SHIPPED[record.dtype], graphs._replace(engines=True)
    return Check(target, "engines", tolerance, engines, reference, batch=batch, ran=", ".join(plans))


def _aliases(target: str, name: str, decoder: Path, aliases: dict[str, str]) -> Check:
    import onnx

    graph = onnx.load(decoder, load_external_data=False).graph
    try:
        if aliases != alias_map(graph):
            raise SemkvError(
                "the graph's caches are not those of the manifest",
                where=decoder.name,
                expected=sorted(aliases.values()),
                got=sorted(alias_map(graph).values()),
            )
        check_alias_safety(graph, aliases)
    except SemkvError as error:
        return Check(target, name, failed=str(error))
    return Check(target, name, passed=f"{len(aliases)} caches appended in place, no reader after an append")

"""What of a bundle can be compared on this machine, with what, and within which tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from semkv_deploy.bundle import TensorRTRecord
from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.aliases import alias_map, check_alias_safety
from semkv_deploy.runtime.open import session_on, tensorrt_engine
from semkv_deploy.targets import TO_RUN
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine
from semkv_deploy.validate import weights
from semkv_deploy.validate.compare import AS_SHIPPED, FLOAT16, INT8
from semkv_deploy.validate.split import SplitEngine

if TYPE_CHECKING:
    from semkv_deploy.bundle import BuiltProfile, Bundle, TargetRecord, TensorRTBudget
    from semkv_deploy.bundle.contract import Phase
    from semkv_deploy.runtime.session import Engine, Session

PORTABLE = "onnx/decoder.onnx"

STRICT = "same weights, float32"

BATCH = 2
"""Rows of a scenario where a target leaves the batch open; they are ragged."""


class Graphs(NamedTuple):
    """A decoder, its compressor (None: the profile never compresses), and how the decoder's caches are bound.

    Attributes:
        prefill: graph of prompts, where the decoder is one of steps only.
        engines: target whose engines of these graphs run, on the GPU; None: the graphs themselves do.
    """

    decoder: Path
    compressor: Path | None
    in_place: bool
    prefill: Path | None = None
    engines: str | None = None


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


def open_session(bundle: Bundle, profile: BuiltProfile, graphs: Graphs, batch: int) -> Session:
    """The session that `runtime.open.open_session` gives, on graphs of our choice."""
    facts, method = bundle.manifest.model, bundle.manifest.method
    options: dict[str, Any] = {
        "facts": facts,
        "batch": batch,
        "capacity": profile.capacity,
        "groups": method.groups(facts.kv_heads),
        "in_place": graphs.in_place,
    }
    engine: Engine
    if graphs.engines:
        record = bundle.target(graphs.engines)
        assert isinstance(record, TensorRTRecord)
        engine = tensorrt_engine(bundle, record, profile, batch)
    elif graphs.prefill:
        engine = SplitEngine(graphs.prefill, graphs.decoder, graphs.compressor, **options)
    else:
        engine = OnnxRuntimeEngine(graphs.decoder, graphs.compressor, **options)
    return session_on(bundle, profile, engine)


def reference_graphs(bundle: Bundle, profile: BuiltProfile) -> Graphs:
    """The portable graphs: function bodies in float32, caches copied."""
    compressor = bundle.root / "onnx" / "compressor.onnx"
    compresses = profile.budget < 1 and compressor.exists()
    return Graphs(bundle.root / PORTABLE, compressor if compresses else None, in_place=False)


def checks(bundle: Bundle, profile: BuiltProfile, target: str, folder: Path) -> list[Check]:
    """The checks of one target at one budget; graphs rewritten for them are written to `folder`."""
    record = bundle.target(target)
    if isinstance(record, TensorRTRecord):
        return _tensorrt(bundle, profile, target, record, folder)
    return _onnxruntime(bundle, profile, target, record, folder)


def _onnxruntime(bundle: Bundle, profile: BuiltProfile, target: str, record: TargetRecord, folder: Path) -> list[Check]:
    decoder = bundle.root / record.decoder
    compressor = bundle.root / record.compressor if record.compressor and profile.budget < 1 else None
    in_place, copying = Graphs(decoder, compressor, True), Graphs(decoder, compressor, False)
    found = [_aliases(target, "aliases", decoder, record.aliases)]
    if record.weights == "fp32":
        found += [Check(target, "in place", STRICT, in_place), Check(target, "copying", STRICT, copying)]
    else:
        try:
            reference = weights.with_target_weights(bundle.root / PORTABLE, decoder, folder)
        except SemkvError as error:
            return [*found, Check(target, "weights", failed=str(error))]
        exact = Graphs(weights.with_float32_activations(decoder, folder), compressor, True)
        found += [
            Check(target, "weights", passed=f"{record.weights} weights are the model's, rounded"),
            Check(target, "float32 activations", STRICT, exact, reference),
            Check(target, "in place", INT8, in_place, reference),
            Check(target, "copying", INT8, copying, reference),
        ]
    return [*found, Check(target, "in place = copying", "same arithmetic", pair=("in place", "copying"))]


def _tensorrt(bundle: Bundle, profile: BuiltProfile, target: str, record: TensorRTRecord, folder: Path) -> list[Check]:
    """The graphs that engines were built from, run in ONNX Runtime as a host runs the engines; then the engines."""
    built = next((built for built in record.budgets if built.contract.budget == profile.budget), None)
    if built is None:
        return [Check(target, "graphs", skipped="not run: the target was not built for this budget")]
    paths: dict[Phase, Path] = {engine.phase: bundle.root / engine.onnx for engine in built.engines}
    aliases = {graph.phase: graph.aliases for graph in built.contract.graphs}
    decoders = {phase: path for phase, path in paths.items() if phase != "compressor"}
    found = [_aliases(target, f"{phase} aliases", path, aliases.get(phase, {})) for phase, path in decoders.items()]
    reference: Path | None = None
    if record.dtype != "float32":
        try:
            reference = weights.with_target_weights(bundle.root / PORTABLE, next(iter(decoders.values())), folder)
        except SemkvError as error:
            return [*found, Check(target, "weights", failed=str(error))]
        found.append(Check(target, "weights", passed=f"{record.dtype} weights are the model's, rounded"))
    ran = ", ".join(path.relative_to(bundle.root).as_posix() for path in paths.values())
    if record.plugins:
        ran += f"; plugin nodes ({', '.join(record.plugins)}) as their operators' bodies, the plugins are not run"
        paths = {phase: weights.with_function_bodies(path, folder) for phase, path in paths.items()}
    shipped = _host(paths)
    name, batch = f"{' and '.join(decoders)} graph{'s' if len(decoders) > 1 else ''}", built.contract.batch
    if reference is None:
        found.append(Check(target, name, STRICT, shipped, batch=batch, ran=ran))
    else:
        exact = _host({phase: weights.in_float32(path, folder) for phase, path in paths.items()})
        found.append(
            Check(target, f"{name} in float32", STRICT, exact, reference, batch=batch, ran=f"{ran}; all in float32")
        )
    if record.dtype == "float16":
        found.append(
            Check(target, f"{name} in float16", FLOAT16, shipped, reference, batch=batch, ran=ran, optional=True)
        )
    return [*found, _engines(target, record, built, shipped, reference)]


def _host(paths: dict[Phase, Path]) -> Graphs:
    """The graphs of all phases as a host runs them: caches in place, prompts by the prefill graph if there is one."""
    decoder = paths.get("decoder") or paths["decode"]
    return Graphs(decoder, paths.get("compressor"), in_place=True, prefill=paths.get("prefill"))


def _engines(
    target: str, record: TensorRTRecord, built: TensorRTBudget, graphs: Graphs, reference: Path | None
) -> Check:
    """The engines themselves, where they run."""
    plans = [engine.plan for engine in built.engines if engine.plan is not None]
    if gap := TO_RUN[target]() if plans else "no engines were built":
        bodies = f", with the bodies of {', '.join(record.plugins)} in place of the plugins" if record.plugins else ""
        return Check(target, "engines", skipped=f"not run: {gap}; their graphs are checked here{bodies}")
    # What they round is not what ONNX Runtime rounds, in float32 either: the graphs beside them are checked strictly.
    tolerance, engines = AS_SHIPPED[record.dtype], graphs._replace(engines=target)
    return Check(target, "engines", tolerance, engines, reference, batch=built.contract.batch, ran=", ".join(plans))


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

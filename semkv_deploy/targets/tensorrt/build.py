"""Builds the `tensorrt` and `tensorrt-rtx` artefacts of a bundle: lowers, lints, builds and proves engines."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import pydantic

from semkv_deploy.bundle import EngineRecord, TensorRTBudget, TensorRTRecord
from semkv_deploy.bundle.contract import (
    Layout,
    Phase,
    ProfileContract,
    StaticBudgetContract,
    graph_contract,
    static_budget_contract,
)
from semkv_deploy.errors import SemkvError
from semkv_deploy.targets import TensorRTTarget
from semkv_deploy.targets.tensorrt.lower import WEIGHTS, Lowered, lower_compressor, lower_decoder, write_weights
from semkv_deploy.targets.tensorrt.plugins import check_asked_are_used, choose_plugins

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.bundle import BuiltProfile
    from semkv_deploy.methods.base import Method
    from semkv_deploy.model.config import ModelFacts
    from semkv_deploy.passes.lower_gqa import BiasMode

Progress = Callable[[str, float | None], None]

SCHEMA_FILE = "contract.schema.json"


class TensorRTOptions(pydantic.BaseModel):
    """How to build for TensorRT.

    Attributes:
        dtype: of weights and caches.
        layout: see `contract.Layout`.
        batch: rows the decode profile and the compressor take.
        compute_capabilities: GPUs to build for, such as "86,89,120"; None: for `tensorrt-rtx` all from Ampere on, for
            `tensorrt` the GPU of this machine.
        plugins: operators that are plugins ("none", "auto": all that the library registers, or names).
        plugin_library: `libsemkv_plugins.so`; it is embedded in the engines.
        memory_limit: bytes the builder may use as workspace; None: no limit.
        engine_cache: folder of engines built before, and of TensorRT's kernel timings; None: none is kept.
        engines: False writes the graphs and the contract, and builds nothing.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    layout: Layout = "dual"
    batch: int = pydantic.Field(default=1, ge=1)
    compute_capabilities: str | None = None
    plugins: tuple[str, ...] = ("none",)
    plugin_library: Path | None = None
    memory_limit: int | None = None
    engine_cache: Path | None = None
    engines: bool = True


_Sizes = dict[str, tuple[int, ...]]
_Run = Literal["prefill", "decode", "both"]


class _Graph(NamedTuple):
    """A lowered graph, what it is for, and its optimization profiles."""

    phase: Phase
    lowered: Lowered
    model: onnx.ModelProto
    profiles: tuple[ProfileContract, ...]

    @property
    def plugins(self) -> set[str]:
        """Operators that are plugins in it, by its promises."""
        nodes = {promise.node for promise in self.lowered.promises if promise.kind == "PLUGIN_V3"}
        return {node.op_type for node in self.model.graph.node if node.name in nodes}


def build_tensorrt(
    root: Path,
    target: TensorRTTarget,
    facts: ModelFacts,
    method: Method,
    profiles: Sequence[BuiltProfile],
    options: TensorRTOptions,
    progress: Progress,
) -> TensorRTRecord:
    """Everything of one TensorRT target, written below `root/targets/<target>`.

    Raises:
        SemkvError: on bad options, a graph that TensorRT would refuse or misread, or an engine without what was asked
            for.
    """
    from semkv_deploy.lint.tensorrt.rules import lint_tensorrt

    choice = choose_plugins(options.plugins, options.plugin_library, target)
    plugins = choice.operators
    folder = root / "targets" / target
    folder.mkdir(parents=True)
    bias: BiasMode = "none" if not method.merges else "layer" if method.groups(facts.kv_heads) == 1 else "head"
    progress(f"{target}: converting weights to {options.dtype}", None)
    graph, weight_bytes = write_weights(root / "onnx" / "decoder.onnx", folder, options.dtype)
    (folder / SCHEMA_FILE).write_text(json.dumps(StaticBudgetContract.json_schema(), indent=1) + "\n", encoding="utf-8")
    findings: list[str] = []
    budgets: list[TensorRTBudget] = []
    version: str | None = None
    capabilities: list[int] = []
    lowered = []
    for profile in profiles:
        progress(f"{target}: lowering budget {profile.budget:g}", None)
        lowered.append(_lower(graph, folder, facts, method, profile, bias, options, plugins))
    in_budgets = [set().union(*(each.plugins for each in graphs)) for graphs in lowered]
    used = set().union(*in_budgets)
    for profile, graphs, here in zip(profiles, lowered, in_budgets, strict=True):
        compresses = any(each.phase == "compressor" for each in graphs)
        check_asked_are_used(choice, here, profile.budget, compresses=compresses, elsewhere=used)
    for profile, graphs in zip(profiles, lowered, strict=True):
        for each in graphs:
            found = lint_tensorrt(each.model, folder=folder, plugins=plugins, profiles=bool(each.profiles))
            for finding in found:
                if finding.fatal:
                    raise SemkvError(finding.what, where=f"{each.lowered.path.name}, {finding.node}", fix=finding.fix)
            findings += [f"{each.lowered.path.name}: {finding}" for finding in found]
        contract = static_budget_contract(
            profile,
            facts,
            method,
            batch=options.batch,
            dtype=options.dtype,
            layout=options.layout,
            graphs=tuple(
                graph_contract(each.model, each.phase, each.lowered.aliases, each.profiles) for each in graphs
            ),
        )
        records = []
        for each in graphs:
            record, version, capabilities = _engine(root, target, each, options, progress)
            records.append(record)
        budgets.append(TensorRTBudget(contract=contract, engines=records))
    library = _keep_library(folder, options) if used else None
    return TensorRTRecord(
        runtime=target,
        version=version,
        compute_capabilities=capabilities,
        dtype=options.dtype,
        layout=options.layout,
        weights=(folder / WEIGHTS).relative_to(root).as_posix(),
        weight_bytes=weight_bytes,
        plugins=sorted(used),
        plugin_library=library,
        budgets=budgets,
        lint=sorted(set(findings)),
    )


def check_options(target: TensorRTTarget, options: TensorRTOptions) -> None:
    """Fails early on options that cannot be built, before minutes of work.

    Raises:
        SemkvError: see `choose_plugins` and `api.parse_compute_capabilities`.
    """
    from semkv_deploy.targets.tensorrt.api import parse_compute_capabilities

    parse_compute_capabilities(options.compute_capabilities, target)
    choose_plugins(options.plugins, options.plugin_library, target)
    cache = options.engine_cache
    if options.engines and cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SemkvError(
                f"cannot be a folder of engines: {error.strerror}",
                where=f"--engine-cache {cache}",
                fix="give a folder, which is made where it is missing",
            ) from None


def _lower(
    graph: bytes,
    folder: Path,
    facts: ModelFacts,
    method: Method,
    profile: BuiltProfile,
    bias: BiasMode,
    options: TensorRTOptions,
    plugins: frozenset[str],
) -> list[_Graph]:
    import onnx

    found = []
    # All its digits: budgets that print alike are still two.
    tag = repr(profile.budget).removesuffix(".0")
    fixed = {"capacity": profile.capacity}
    one_row = {**fixed, "batch": 1}
    chunk, batch = profile.prefill_chunk, options.batch
    many = (1, batch, batch) if batch > 1 else (1, 1, 1)
    # Sizes by symbol as (min, opt, max); what is static in a graph has no symbol left.
    prefill: _Sizes = {"batch": (1, 1, 1), "sequence": (1, chunk, chunk), "rows": (1, 1, chunk)}
    decode: _Sizes = {"batch": many, "sequence": (1, 1, 1), "rows": (1, 1, 1)}
    both: _Sizes = {"batch": many, "sequence": (1, 1, chunk), "rows": (1, 1, chunk)}
    plans: list[tuple[Phase, dict[str, int], list[tuple[_Run, _Sizes]]]]
    if options.layout == "split":
        plans = [
            ("prefill", one_row, [("prefill", prefill)]),
            ("decode", {**fixed, "batch": batch, "sequence": 1, "rows": 1}, []),
        ]
    elif options.layout == "dual":
        plans = [("decoder", fixed if batch > 1 else one_row, [("prefill", prefill), ("decode", decode)])]
    else:
        plans = [("decoder", fixed if batch > 1 else one_row, [("both", both)])]
    for phase, dims, profiles in plans:
        # The plugin is made for few rows: an engine of its own for prompts has native fused attention.
        own = plugins - {"NexusAttention"} if phase == "prefill" else plugins
        lowered = lower_decoder(graph, folder / f"{phase}.{tag}.onnx", bias=bias, dims=dims, plugins=own)
        model = onnx.load(lowered.path, load_external_data=False)
        contracts = tuple(_profile(model, name, sizes, facts.kv_heads) for name, sizes in profiles)
        found.append(_Graph(phase, lowered, model, contracts))
    if profile.budget < 1:
        compressor = lower_compressor(
            method,
            facts,
            folder / f"compressor.{tag}.onnx",
            dtype=options.dtype,
            batch=batch,
            capacity=profile.capacity,
            levels=len(profile.thresholds[0]),
            plugins=plugins,
        )
        if compressor is not None:
            found.append(_Graph("compressor", compressor, onnx.load(compressor.path), ()))
    return found


def _profile(
    model: onnx.ModelProto,
    phase: _Run,
    sizes: _Sizes,
    kv_heads: int,
) -> ProfileContract:
    """The optimization profile of a graph: shapes of its inputs that have symbols."""
    rows = tuple(size * kv_heads for size in sizes["batch"])
    by_symbol = {**sizes, "cache_rows": rows}
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if any(dim.dim_param for dim in dims):
            low, best, high = (
                tuple(by_symbol[dim.dim_param][i] if dim.dim_param else dim.dim_value for dim in dims) for i in range(3)
            )
            shapes[value.name] = (low, best, high)
    return ProfileContract(phase=phase, shapes=shapes)


def _engine(
    root: Path,
    target: TensorRTTarget,
    graph: _Graph,
    options: TensorRTOptions,
    progress: Progress,
) -> tuple[EngineRecord, str | None, list[int]]:
    """Builds one engine; returns its record, the runtime's version and the compute capabilities built for."""
    path = graph.lowered.path
    kinds = Counter(promise.kind for promise in graph.lowered.promises)
    if not options.engines:
        record = EngineRecord(
            phase=graph.phase,
            onnx=path.relative_to(root).as_posix(),
            plan=None,
            bytes=0,
            layers=dict(sorted(kinds.items())),
        )
        return record, None, []
    from semkv_deploy.targets.tensorrt.api import parse_compute_capabilities
    from semkv_deploy.targets.tensorrt.builder import EngineRequest, build_engine

    plan = path.with_suffix(".plan")
    capabilities = parse_compute_capabilities(options.compute_capabilities, target)
    plugins = sorted(graph.plugins)
    result = build_engine(
        EngineRequest(
            runtime=target,
            onnx=path,
            plan=plan,
            profiles=[profile.shapes for profile in graph.profiles],
            compute_capabilities=capabilities,
            plugin_library=options.plugin_library if plugins else None,
            embed_plugins=bool(plugins),
            plugins=plugins,
            promised=list(graph.lowered.promises),
            aliases=graph.lowered.aliases,
            memory_limit=options.memory_limit,
            timing_cache=options.engine_cache / "timing.cache" if options.engine_cache else None,
            engine_cache=options.engine_cache,
        ),
        lambda what, share: progress(f"{target}: {path.stem}: {what}", share),
    )
    record = EngineRecord(
        phase=graph.phase,
        onnx=path.relative_to(root).as_posix(),
        plan=plan.relative_to(root).as_posix(),
        bytes=result.bytes,
        layers=dict(sorted(result.proved.kinds.items())),
        seconds=0 if result.from_cache else round(result.seconds, 1),
        weight_bytes=result.weight_bytes,
        peak_rss=None if result.from_cache else result.peak_rss,
        timing_cache=result.timing_cache,
        warnings=result.warnings,
    )
    return record, result.version, capabilities


def _keep_library(folder: Path, options: TensorRTOptions) -> str:
    """Copies the plugin library into the bundle: hosts that do not run embedded code load it."""
    assert options.plugin_library is not None
    shutil.copyfile(options.plugin_library, folder / options.plugin_library.name)
    return options.plugin_library.name

"""Builds the `tensorrt` and `tensorrt-rtx` artefacts of a bundle: lowers, lints, builds and proves engines."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import pydantic

from semkv_deploy.bundle.contract import (
    Contract,
    GraphContract,
    Phase,
    ProfileContract,
    graph_contract,
)
from semkv_deploy.bundle.manifest import BudgetRecord, EngineRecord, TensorRTRecord
from semkv_deploy.choices import DType, EngineLayout, TensorRTTarget
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.layout import DECODE, Program
from semkv_deploy.passes.lower_native import FOLDED_ROWS
from semkv_deploy.targets.build import Progress, TargetInputs, file_stem
from semkv_deploy.targets.tensorrt.lower import WEIGHTS, Lowered, lower_compressor, lower_decoder, write_weights
from semkv_deploy.targets.tensorrt.plugins import check_asked_are_used, choose_plugins
from semkv_deploy.targets.tensorrt.trusted_folder import make_private_folder

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.budget import BudgetProfile

SCHEMA_FILE = "contract.schema.json"


class TensorRTOptions(pydantic.BaseModel):
    """How to build for TensorRT.

    Attributes:
        dtype: of weights and caches.
        layout: see `choices.EngineLayout`.
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

    dtype: DType = "float16"
    layout: EngineLayout = "dual"
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
    """A lowered graph: its program, what it is for, its optimization profiles, and the cache groups that it takes."""

    program: str
    phase: Phase
    lowered: Lowered
    model: onnx.ModelProto
    profiles: tuple[ProfileContract, ...]
    groups: tuple[int, ...]

    @property
    def plugins(self) -> set[str]:
        """Operators that are plugins in it, by its promises."""
        nodes = {promise.node for promise in self.lowered.promises if promise.kind == "PLUGIN_V3"}
        return {node.op_type for node in self.model.graph.node if node.name in nodes}


def build_tensorrt(inputs: TargetInputs, target: TensorRTTarget, options: TensorRTOptions) -> TensorRTRecord:
    """Everything of one TensorRT target, written below `targets/<target>`.

    Raises:
        SemkvError: on bad options, a graph that TensorRT would refuse or misread, or an engine without what was asked
            for.
    """
    choice = choose_plugins(options.plugins, options.plugin_library, target)
    plugins = choice.operators
    folder = inputs.root / "targets" / target
    folder.mkdir(parents=True)
    inputs.progress(f"{target}: converting weights to {options.dtype}", None)
    decoder, weight_bytes = write_weights(inputs.portable, folder, options.dtype)
    schema = json.dumps(Contract.model_json_schema(), indent=1)
    (folder / SCHEMA_FILE).write_text(schema + "\n", encoding="utf-8")
    lowered = []
    for profile in inputs.profiles:
        inputs.progress(f"{target}: lowering budget {profile.budget:g}", None)
        lowered.append(_lower(decoder, folder, inputs, profile, options, plugins))
    in_budgets = [set().union(*(each.plugins for each in graphs)) for graphs in lowered]
    used = set().union(*in_budgets)
    for profile, graphs, here in zip(inputs.profiles, lowered, in_budgets, strict=True):
        compresses = any(each.phase == "compressor" for each in graphs)
        check_asked_are_used(choice, here, profile.budget, compresses=compresses, elsewhere=used)
    findings: list[str] = []
    for graphs in lowered:
        for each in graphs:
            findings += _lint(each, folder, plugins)
    built = [[_engine(target, each, options, inputs.progress) for each in graphs] for graphs in lowered]
    budgets = []
    for profile, graphs, engines in zip(inputs.profiles, lowered, built, strict=True):
        of_programs: dict[str, list[GraphContract]] = {}
        for each in graphs:
            of_programs.setdefault(each.program, []).append(_contract(each, inputs.root, options.engines))
        contract = inputs.contract(
            target,
            profile,
            of_programs,
            dtype=options.dtype,
            batch=options.batch,
            engine_layout=options.layout,
        )
        budgets.append(BudgetRecord(contract=contract, engines=[record for record, _ in engines]))
    return TensorRTRecord(
        runtime=target,
        version=next((version for engines in built for _, version in engines), None),
        compute_capabilities=_capabilities(target, options),
        dtype=options.dtype,
        layout=options.layout,
        weights=(folder / WEIGHTS).relative_to(inputs.root).as_posix(),
        weight_bytes=weight_bytes,
        plugins=sorted(used),
        plugin_library=_keep_library(folder, options) if used else None,
        budgets=budgets,
        lint=sorted(set(findings)),
    )


def _capabilities(target: TensorRTTarget, options: TensorRTOptions) -> list[int]:
    from semkv_deploy.targets.tensorrt.api import parse_compute_capabilities

    return parse_compute_capabilities(options.compute_capabilities, target) if options.engines else []


def _lint(graph: _Graph, folder: Path, plugins: frozenset[str]) -> list[str]:
    """What the lint found in a lowered graph.

    Raises:
        SemkvError: when TensorRT would refuse or misread it.
    """
    from semkv_deploy.lint.tensorrt.rules import lint_tensorrt

    name = graph.lowered.path.name
    findings = lint_tensorrt(graph.model, folder=folder, plugins=plugins, profiles=bool(graph.profiles))
    for finding in findings:
        if finding.fatal:
            raise SemkvError(finding.what, where=f"{name}, {finding.node}", fix=finding.fix)
    return [f"{name}: {finding}" for finding in findings]


def _contract(graph: _Graph, root: Path, engines: bool) -> GraphContract:
    path = graph.lowered.path
    return graph_contract(
        graph.model,
        path.stem,
        graph.phase,
        path.relative_to(root).as_posix(),
        groups=graph.groups,
        aliases=graph.lowered.aliases,
        plan=path.with_suffix(".plan").relative_to(root).as_posix() if engines else None,
        profiles=graph.profiles,
    )


def check_options(target: TensorRTTarget, options: TensorRTOptions) -> None:
    """Fails early on options that cannot be built, before minutes of work.

    Raises:
        SemkvError: see `choose_plugins` and `api.parse_compute_capabilities`.
    """
    from semkv_deploy.targets.tensorrt.api import parse_compute_capabilities

    parse_compute_capabilities(options.compute_capabilities, target)
    choose_plugins(options.plugins, options.plugin_library, target)
    if options.engines and options.engine_cache is not None:
        make_private_folder(options.engine_cache, "--engine-cache")


def _lower(
    decoder: bytes,
    folder: Path,
    inputs: TargetInputs,
    profile: BudgetProfile,
    options: TensorRTOptions,
    plugins: frozenset[str],
) -> list[_Graph]:
    """Every graph of one budget, written to `folder`."""
    import onnx

    # All its digits: budgets that print alike are still two.
    tag = repr(profile.budget).removesuffix(".0")
    graphs = []
    symbols = inputs.method.symbols(profile)
    for phase, dims, runs in _decoder_plans(profile, options):
        # The plugin is made for few rows: an engine of its own for prompts has native fused attention.
        own = plugins - {"NexusAttention"} if phase == "prefill" else plugins
        lowered = lower_decoder(
            decoder, folder / f"{phase}.{tag}.onnx", bias=inputs.method.bias_mode, dims={**dims, **symbols}, plugins=own
        )
        model = onnx.load(lowered.path, load_external_data=False)
        profiles = tuple(_profile(model, name, sizes) for name, sizes in runs)
        graphs.append(_Graph(DECODE, phase, lowered, model, profiles, tuple(range(len(profile.groups)))))
    used = inputs.used_programs(profile)
    layout = inputs.method.layout(inputs.model, profile.groups)
    for program in inputs.method.programs(inputs.model.model_copy(update={"dtype": options.dtype}), layout):
        if program.name in used:
            graphs += _lower_program(program, folder, tag, inputs, profile, options, plugins)
    return graphs


def _decoder_plans(
    profile: BudgetProfile, options: TensorRTOptions
) -> list[tuple[Phase, dict[str, int], list[tuple[_Run, _Sizes]]]]:
    """The decoder's graphs in a layout: phase, sizes that are static by symbol, and the runs of its profiles."""
    fixed = {group.symbol: group.capacity for group in profile.groups}
    one_row = {**fixed, "batch": 1}
    chunk, batch = profile.prefill_chunk, options.batch
    many = (1, batch, batch) if batch > 1 else (1, 1, 1)
    # Sizes by symbol as (min, opt, max); what is static in a graph has no symbol left.
    prefill: _Sizes = {"batch": (1, 1, 1), "sequence": (1, chunk, chunk), "rows": (1, 1, chunk)}
    decode: _Sizes = {"batch": many, "sequence": (1, 1, 1), "rows": (1, 1, 1)}
    both: _Sizes = {"batch": many, "sequence": (1, 1, chunk), "rows": (1, 1, chunk)}
    if options.layout == "split":
        return [
            ("prefill", one_row, [("prefill", prefill)]),
            ("decode", {**fixed, "batch": batch, "sequence": 1, "rows": 1}, []),
        ]
    dims = fixed if batch > 1 else one_row
    if options.layout == "dual":
        return [("decoder", dims, [("prefill", prefill), ("decode", decode)])]
    return [("decoder", dims, [("both", both)])]


def _lower_program(
    program: Program,
    folder: Path,
    tag: str,
    inputs: TargetInputs,
    profile: BudgetProfile,
    options: TensorRTOptions,
    plugins: frozenset[str],
) -> list[_Graph]:
    """A group's program, once for each capacity that its groups have."""
    import onnx

    by_capacity: dict[int, list[int]] = {}
    for number in program.groups:
        by_capacity.setdefault(profile.groups[number].capacity, []).append(number)
    everything = len(program.groups) == len(profile.groups)
    graphs = []
    for capacity, numbers in sorted(by_capacity.items()):
        heads = len(profile.groups[numbers[0]].heads)
        kind = ("" if everything else f".{heads}_heads") + ("" if len(by_capacity) == 1 else f".{capacity}_slots")
        lowered = lower_compressor(
            onnx.ModelProto.FromString(program.graph.SerializeToString()),
            folder / f"{file_stem(program.name)}{kind}.{tag}.onnx",
            batch=options.batch,
            capacity=capacity,
            levels=inputs.method.ladder_levels,
            symbols=inputs.method.symbols(profile),
            plugins=plugins,
        )
        model = onnx.load(lowered.path)
        graphs.append(_Graph(program.name, "compressor", lowered, model, (), tuple(numbers)))
    return graphs


def _profile(model: onnx.ModelProto, phase: _Run, sizes: _Sizes) -> ProfileContract:
    """The optimization profile of a graph: shapes of its inputs that have symbols."""
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if any(dim.dim_param for dim in dims):
            low, best, high = (
                tuple(_size(dim.dim_param, sizes)[i] if dim.dim_param else dim.dim_value for dim in dims)
                for i in range(3)
            )
            shapes[value.name] = (low, best, high)
    return ProfileContract(phase=phase, shapes=shapes)


def _size(symbol: str, sizes: _Sizes) -> tuple[int, ...]:
    """A symbol's (min, opt, max); a folded cache has batch x KV heads rows."""
    if symbol.startswith(FOLDED_ROWS):
        heads = int(symbol.removeprefix(FOLDED_ROWS))
        return tuple(size * heads for size in sizes["batch"])
    return sizes[symbol]


def _engine(
    target: TensorRTTarget, graph: _Graph, options: TensorRTOptions, progress: Progress
) -> tuple[EngineRecord, str | None]:
    """Builds one engine; returns its record, and the version of the runtime that built it."""
    path = graph.lowered.path
    kinds = Counter(promise.kind for promise in graph.lowered.promises)
    if not options.engines:
        return EngineRecord(graph=path.stem, bytes=0, layers=dict(sorted(kinds.items()))), None
    from semkv_deploy.targets.tensorrt.builder import build_engine
    from semkv_deploy.targets.tensorrt.request import EngineRequest

    plan = path.with_suffix(".plan")
    capabilities = _capabilities(target, options)
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
        graph=path.stem,
        bytes=result.bytes,
        layers=dict(sorted(result.proved.kinds.items())),
        seconds=0 if result.from_cache else round(result.seconds, 1),
        weight_bytes=result.weight_bytes,
        peak_rss=None if result.from_cache else result.peak_rss,
        timing_cache=result.timing_cache,
        warnings=result.warnings,
    )
    return record, result.version


def _keep_library(folder: Path, options: TensorRTOptions) -> str:
    """Copies the plugin library into the bundle: hosts that do not run embedded code load it."""
    assert options.plugin_library is not None
    shutil.copyfile(options.plugin_library, folder / options.plugin_library.name)
    return options.plugin_library.name

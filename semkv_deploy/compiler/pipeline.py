"""From a checkpoint or an exported decoder to a bundle, in named steps that hand one value along."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.budget import BudgetProfile, choose_context
from semkv_deploy.budget_units import BudgetLike, resolve_budgets
from semkv_deploy.bundle import (
    MANIFEST,
    Bundle,
    Manifest,
    new_directory,
    sha256,
    slot_bytes,
    tool_versions,
    write_manifest,
)
from semkv_deploy.bundle.contract import Contract, GraphContract, Phase, graph_contract
from semkv_deploy.bundle.own import foreign
from semkv_deploy.compiler import calibrate, reading
from semkv_deploy.compiler import domains as domain
from semkv_deploy.compiler.limits import (
    check_cuda_head_size,
    check_head_size,
    check_reading,
    check_selecting,
    check_source_limits,
    check_targets,
)
from semkv_deploy.compiler.shares import cache_groups, calibrated_shares, make_profiles
from semkv_deploy.compiler.source import take_source, weights_of_source
from semkv_deploy.errors import SemkvError
from semkv_deploy.export import local_source
from semkv_deploy.methods.layout import DECODE
from semkv_deploy.model.cache_groups import GroupShare, is_default
from semkv_deploy.model.delimiters import Delimiters
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.targets import is_tensorrt
from semkv_deploy.targets.build import Progress, TargetInputs, WrittenProgram, file_stem
from semkv_deploy.targets.onnxruntime.build import BuiltDecoder, build_onnxruntime, lower_decoder, save_decoder
from semkv_deploy.targets.onnxruntime.native import choices_of

if TYPE_CHECKING:
    from semkv_deploy.choices import BudgetBy, CacheType, Native, WeightFormat
    from semkv_deploy.methods import Method
    from semkv_deploy.methods.calibration import Reading, Settings
    from semkv_deploy.methods.dd_select import DelimiterTable, DomainText
    from semkv_deploy.model.config import ModelFacts
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions

PLAIN = "plain.onnx"
"""The portable decoder before a method that selects rewrote it, while a bundle is built."""

PORTABLE = "portable"
"""What contracts of portable graphs have for a target."""


@dataclass(frozen=True)
class Reference:
    """The decoder lowered for ONNX Runtime in float32, and what it says of the calibration text.

    Attributes:
        built: what writing it gave.
        tokens: the text.
        logits: of the text.
        settings: what the method was calibrated to.
    """

    path: Path
    built: BuiltDecoder
    tokens: list[int]
    logits: calibrate.StoredLogits
    settings: Settings | None


def build_bundle(
    source: Path | str,
    out: Path | str,
    *,
    budgets: Sequence[BudgetLike],
    method: Method,
    max_context: int | None = None,
    groups: Sequence[GroupShare] | str | None = None,
    budget_by: BudgetBy | None = None,
    target: str | Sequence[str] = "onnxruntime-cpu",
    weights: WeightFormat = "int4",
    native: Native = "auto",
    cache_dtype: CacheType = "float32",
    tensorrt: TensorRTOptions | None = None,
    calibration_text: str | None = None,
    calibration: DelimiterTable | None = None,
    family: str | None = None,
    portable: bool = True,
    prove_import: bool = True,
    config_from: Path | None = None,
    force: bool = False,
    progress: Progress = lambda what, share: None,
) -> Bundle:
    """Builds a bundle at `out`; nothing is left there when it fails or is interrupted.

    Args:
        source: `decoder.onnx` of an export directory, another exporter's ONNX decoder, or anything `export` takes.
        budgets: shares of cache entries kept, slots or bytes (`0.2`, `1638tokens`, `64MiB`), one profile each.
        max_context: most tokens of a conversation; None: the model's, at most 8,192.
        groups: cache groups and their shares of the cache, or what `model.cache_groups.parse_groups` takes; None: one a
            layer, all alike.
        budget_by: "layer" or "head": calibrate how much of each budget a layer or KV head gets, in place of `groups`;
            None: as the method does, unless groups are given.
        target: one or several.
        weights: how `onnxruntime-*` targets store weights.
        native: whether `onnxruntime-cpu` has native operators; "auto": where their library is here. `onnxruntime-cuda`
            always has.
        cache_dtype: type of the caches of `onnxruntime-*` targets; all but float32 take native operators.
        tensorrt: options of the `tensorrt*` targets; None: the defaults.
        calibration_text: None: the text that ships with the package.
        calibration: what `calibrate_delimiters` gave, for a method that weighs delimiters; None: it is calibrated here,
            on the texts that ship with the package.
        portable: keep the portable graphs and their float32 weights, which `validate` compares with.
        prove_import: compare another exporter's graph with what it was rewritten to.
        config_from: folder of the configuration and the tokenizer of another exporter's graph; None: the graph's.
        family: fail unless the model is of this one (what a recipe is made for).

    Raises:
        SemkvError: on any input that cannot be built.
    """
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions, build_tensorrt

    source, out = str(source), Path(out)
    targets = [target] if isinstance(target, str) else list(dict.fromkeys(target))
    options = tensorrt or TensorRTOptions()
    check_targets(targets, options)
    choices = choices_of([name for name in targets if not is_tensorrt(name)], native, cache_dtype)
    check_source_limits(source)
    sources = [Path(source).parent] if Path(source).suffix == ".onnx" else local_source(source)
    with new_directory(out, force=force, foreign=foreign, sources=sources) as root:
        model = take_source(source, root, family, progress, prove_import=prove_import, config_from=config_from)
        check_head_size(model.head_dim, source)
        check_cuda_head_size(model.head_dim, targets)
        stored = weights_of_source(root, weights, targets, progress)
        context = choose_context(max_context, model.max_position)
        method = method.for_build(records=not any(map(is_tensorrt, targets)), capped=is_capped(root)).resolve(model)
        check_reading(method, targets)
        check_selecting(method, targets, cache_dtype, options, native=all(choice.on for choice in choices.values()))
        cache_types = {options.dtype if is_tensorrt(name) else cache_dtype for name in targets}
        resolved = resolve_budgets(budgets, context, slot_bytes(model, cache_types))
        budget_by = budget_by or ("uniform" if groups is not None or min(resolved) == 1 else method.budget_by)
        given = cache_groups(groups, budget_by, model)
        readings: list[Reading] = []
        if budget_by != "uniform" or method.scores:
            readings = read_text_again(root, model, calibration_text, progress)
        domains: list[DomainText] = []
        if calibration is not None:
            domain.check_table(calibration, method, model)
        elif method.reads_domains:
            domains = domain.read_domain_texts(root, model, method, None, progress)
        of_budgets = [given] * len(resolved)
        if budget_by != "uniform":
            of_budgets = calibrated_shares(
                readings, model, resolved, budget_by, sinks=method.sinks, recent_share=method.recent_share
            )
        shares = of_budgets[0]
        profiles = make_profiles(resolved, context, model, of_budgets, method.reads_again)
        programs = write_portable(root, model, method, profiles)
        progress("lowering the decoder", None)
        reference = read_calibration_text(
            root, model, method, shares, calibration_text, readings, domains, calibration, progress
        )
        for profile in profiles:
            for warning in method.warnings(model, profile, reference.settings):
                progress(f"warning: {warning}", None)
        inputs = TargetInputs(
            root=root,
            model=model,
            method=method,
            max_context=context,
            groups=shares,
            profiles=profiles,
            settings=reference.settings,
            programs=programs,
            stop_ids=model.eos_token_ids,
            progress=progress,
        )
        records = {
            name: build_tensorrt(inputs, name, options)
            if is_tensorrt(name)
            else build_onnxruntime(
                inputs,
                name,
                stored,
                reference.path,
                reference.built,
                choices[name],
                cost=lambda decoder, cache_dtype, native: calibrate.weight_cost(
                    decoder,
                    model,
                    shares,
                    reference.tokens,
                    reference.logits,
                    method,
                    cache_dtype=cache_dtype,
                    native=native,
                ),
            )
            for name in targets
        }
        shutil.rmtree(root / "work")
        if not portable:
            shutil.rmtree(root / "onnx")
        progress("writing the manifest", None)
        manifest = Manifest(
            model=model,
            method=method,
            max_context=context,
            calibration=reference.settings.model_dump(mode="json") if reference.settings else None,
            portable=portable_contracts(inputs) if portable else [],
            targets=records,
            versions=tool_versions(),
            files={},
        )
        manifest = write_manifest(root, manifest)
    return Bundle(out, manifest, fingerprint=sha256(out / MANIFEST))


def is_capped(root: Path) -> bool:
    """Whether the exported decoder caps its attention's logits."""
    import onnx_ir as ir

    from semkv_deploy.methods.attention_nodes import caps_logits

    return caps_logits(ir.load(root / "onnx" / "decoder.onnx").graph)


def read_text_again(root: Path, model: ModelFacts, text: str | None, progress: Progress) -> list[Reading]:
    """What the model looks at when it reads the calibration text, and reads it again.

    Raises:
        SemkvError: when the text, or the model's context, is too short.
    """
    pieces = reading.reading_tokens(load_tokenizer(root), model, text)
    progress("reading the calibration text again", 0.0)
    return reading.read_again(
        root / "onnx" / "decoder.onnx",
        root / "work",
        model,
        pieces,
        lambda share: progress("reading the calibration text again", share),
    )


def calibrate_delimiters(
    source: Path | str,
    method: Method,
    texts: Mapping[str, str] | None = None,
    *,
    progress: Progress = lambda what, share: None,
) -> DelimiterTable:
    """Weights of a model's delimiters by DD-Select, for `build_bundle(calibration=…)`.

    Args:
        source: as `build_bundle`.
        method: one that weighs delimiters; its regions count.
        texts: by domain; None: those that ship with the package.

    Raises:
        SemkvError: for a method that weighs none, a text that is too short, or a source that cannot be read.
    """
    from semkv_deploy.methods.dd_select import delimiter_table

    if not method.reads_domains:
        raise SemkvError(
            "weighs no delimiters", where=f"--method {method.kind}", expected="dynsplit with blocks=dynamic", got=method
        )
    check_source_limits(str(source))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = take_source(str(source), root, None, progress)
        check_head_size(model.head_dim, str(source))
        read = domain.read_domain_texts(root, model, method, texts, progress)
        return delimiter_table(read, method.regions, model.vocab_size)


def write_portable(
    root: Path, model: ModelFacts, method: Method, profiles: Sequence[BudgetProfile]
) -> tuple[WrittenProgram, ...]:
    """Rewrites the portable decoder for the groups and the method, and writes the method's graphs beside it."""
    import onnx_ir as ir

    from semkv_deploy.methods.base import Method as Base
    from semkv_deploy.passes.split_groups import split_groups

    layout = method.layout(model, profiles[0].groups)
    default = is_default(profiles[0].groups, model.layers)
    if not default or type(method).rewrite_decoder is not Base.rewrite_decoder:
        path = root / "onnx" / "decoder.onnx"
        decoder = ir.load(path)
        if not default:
            split_groups(decoder, profiles[0].groups)
        if method.selects:
            # What is calibrated on, and weights are compared with, attends to everything.
            (root / "onnx" / PLAIN).write_bytes(ir.to_proto(decoder).SerializeToString(deterministic=True))
        method.rewrite_decoder(decoder, layout)
        # The graph only: weights stay in the file that it names.
        path.write_bytes(ir.to_proto(decoder).SerializeToString(deterministic=True))
    programs = method.programs(model, layout)
    written = []
    for program in programs:
        alone = sum(other.name == program.name for other in programs) == 1
        heads = len(layout.groups[program.groups[0]].heads)
        name = file_stem(program.name) + ("" if alone else f".{heads}_heads")
        file = f"onnx/{name}.onnx"
        (root / file).write_bytes(program.graph.SerializeToString(deterministic=True))
        written.append(WrittenProgram(program.name, file, program.groups, program.in_place))
    return tuple(written)


def read_calibration_text(
    root: Path,
    model: ModelFacts,
    method: Method,
    groups: tuple[GroupShare, ...],
    text: str | None,
    readings: Sequence[Reading],
    domains: Sequence[DomainText],
    known: DelimiterTable | None,
    progress: Progress,
) -> Reference:
    """Lowers the decoder in float32 to `root/work`, runs the calibration text through it, and calibrates the method.

    Raises:
        SemkvError: when the text is too short.
    """
    path = root / "work" / "decoder.onnx"
    plain = root / "onnx" / PLAIN
    portable = plain if plain.exists() else root / "onnx" / "decoder.onnx"
    lowered = lower_decoder(portable, bias=method.bias_mode, groups=len(groups))
    plain.unlink(missing_ok=True)
    built = save_decoder(lowered, path)
    tokens = calibrate.calibration_tokens(load_tokenizer(root), model, text)
    progress("calibrating", 0.0)
    logits = calibrate.StoredLogits(root / "work" / "logits")
    layout = None if method.selects else method
    engine = calibrate.read_text(path, model, groups, tokens, logits.append, layout)
    delimiters = Delimiters.read(root / "delimiters.json")
    settings = calibrate.calibrate(
        method,
        model,
        engine,
        tokens,
        delimiters,
        readings,
        domains,
        known,
        lambda share: progress("calibrating", share),
    )
    return Reference(path, built, tokens, logits, settings)


def portable_contracts(inputs: TargetInputs) -> list[Contract]:
    """Contracts of the portable graphs: what every target is compared with."""
    import onnx

    from semkv_deploy.lint.aliases import alias_map

    def contract(file: str, phase: Phase, groups: Sequence[int]) -> GraphContract:
        graph = onnx.load(inputs.root / file, load_external_data=False)
        aliases = alias_map(graph.graph) if phase == "decoder" else {}
        return graph_contract(graph, Path(file).stem, phase, file, groups=groups, aliases=aliases)

    graphs = {DECODE: [contract("onnx/decoder.onnx", "decoder", range(len(inputs.groups)))]}
    for program in inputs.programs:
        graphs.setdefault(program.name, []).append(contract(program.file, "compressor", program.groups))
    return [inputs.contract(PORTABLE, profile, graphs, dtype=inputs.model.dtype) for profile in inputs.profiles]

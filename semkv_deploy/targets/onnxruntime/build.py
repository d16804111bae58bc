"""Builds the `onnxruntime-*` artefacts of a bundle: lowers, quantises, lints, and proves the caches are in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.bundle.contract import graph_contract
from semkv_deploy.bundle.manifest import BudgetRecord, OnnxRuntimeRecord
from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.aliases import alias_map, check_alias_safety
from semkv_deploy.lint.onnxruntime import lint_onnxruntime
from semkv_deploy.methods.layout import COMPRESS, DECODE
from semkv_deploy.targets.onnxruntime.native import NATIVE_DECODER, NATIVE_PROGRAMS

if TYPE_CHECKING:
    import onnx_ir as ir

    from semkv_deploy.bundle.contract import GraphContract, Phase
    from semkv_deploy.choices import CacheType, StoredWeights
    from semkv_deploy.methods.base import BiasMode
    from semkv_deploy.targets.build import TargetInputs
    from semkv_deploy.targets.onnxruntime.native import NativeChoice

DECODER = "decoder.onnx"

DATA_ALIGNMENT = 64
"""Bytes: ONNX Runtime maps the file at any offset, and its kernels read a cache line at a time."""


class BuiltDecoder(NamedTuple):
    """A lowered decoder on disk: its alias map, bytes of weights, and lint findings that did not stop the inputs."""

    aliases: dict[str, str]
    weight_bytes: int
    lint: list[str]


def lower_decoder(
    portable: Path,
    *,
    bias: BiasMode,
    groups: int,
    rewrite: Callable[[ir.Model], None] = lambda model: None,
    native: CacheType | None = None,
) -> ir.Model:
    """The decoder for ONNX Runtime in float32; its weights stay in the portable decoder's file until it is saved.

    Args:
        groups: cache groups that the portable decoder has, a `NexusAttention` for each.
        rewrite: changes the portable graph first.
        native: type of the caches of native operators; None: ONNX Runtime's own attention, caches in float32.

    Raises:
        SemkvError: when not every group's attention was lowered.
    """
    import onnx_ir as ir
    from onnxscript.optimizer import optimize

    from semkv_deploy.passes.branch_adapters import branch_adapters
    from semkv_deploy.passes.branch_attention import attends_in_branches, branch_attention
    from semkv_deploy.passes.fuse import fuse_for_onnxruntime
    from semkv_deploy.passes.keep_native import keep_as_native
    from semkv_deploy.passes.lower_gqa import lower_to_gqa
    from semkv_deploy.passes.selection import selects

    model = ir.load(portable)
    rewrite(model)
    fuse_for_onnxruntime(model)
    if native is None and selects(model):
        kind, lowered = "If", branch_attention(model, bias=bias)
    elif native is None:
        kind, lowered = "GroupQueryAttention", lower_to_gqa(model, bias=bias)
    else:
        kind, lowered = "NexusAttention", keep_as_native(model, bias=bias, cache_dtype=native, kept=NATIVE_DECODER)
    optimize(model)
    of_kind = [node for node in model.graph if node.op_type.split("_")[0] == kind]
    found = sum(kind != "If" or attends_in_branches(node) for node in of_kind)
    if not lowered == found == groups:
        raise SemkvError("attention was lost while lowering", where=portable.name, expected=groups, got=found)
    branch_adapters(model)
    return model


def save_decoder(model: ir.Model, path: Path, *, native: bool = False) -> BuiltDecoder:
    """Writes a lowered decoder and one file of weights, to which `model` refers afterwards, and checks the graph.

    Args:
        native: the graph has native operators.

    Raises:
        SemkvError: when lint finds something that would make the target wrong, or an append in place is not safe.
    """
    import onnx

    from semkv_deploy.graph.files import write_model

    path.parent.mkdir(parents=True, exist_ok=True)
    data = write_model(model, path, alignment=DATA_ALIGNMENT)
    written = onnx.load(path, load_external_data=False)
    findings = lint_onnxruntime(written, native=native)
    for finding in findings:
        if finding.fatal:
            raise SemkvError(finding.what, where=finding.node, fix=finding.fix)
    aliases = alias_map(written.graph)
    check_alias_safety(written.graph, aliases)
    return BuiltDecoder(aliases, data.stat().st_size, [str(finding) for finding in findings])


def build_onnxruntime(
    inputs: TargetInputs,
    target: str,
    weights: StoredWeights,
    reference: Path,
    built: BuiltDecoder,
    choice: NativeChoice,
    *,
    cost: Callable[[Path, CacheType, int | None], float],
) -> OnnxRuntimeRecord:
    """Everything of one ONNX Runtime target, written below `targets/<target>`.

    Args:
        reference: the lowered float32 decoder without native operators, of a method that selects without selection;
            `built` is what writing it gave.
        choice: whether the decoder has native operators, and the type of its caches.
        cost: measures the mean KL of a decoder on disk, with caches of a type and native operators of a version.

    Raises:
        SemkvError: as `save_decoder`.
    """
    import onnx

    from semkv_deploy.passes.narrow_caches import narrow_caches
    from semkv_deploy.passes.quantize import quantize_weights

    folder = inputs.root / "targets" / target
    folder.mkdir(parents=True)
    decoder = folder / DECODER
    native, cache_dtype = choice.version, choice.cache_dtype
    plain = reference
    inputs.progress(f"{'native operators' if choice.on else 'no native operators'}: {choice.why}", None)
    if choice.on or inputs.method.selects:
        # Calibration attended to everything, in ONNX Runtime's own operators.
        reference = inputs.root / "work" / "target" / DECODER
        bias, groups = inputs.method.bias_mode, len(inputs.groups)
        lowered = lower_decoder(inputs.portable, bias=bias, groups=groups, native=cache_dtype if choice.on else None)
        built = save_decoder(lowered, reference, native=choice.on)
    if inputs.method.selects and not choice.on:
        inputs.progress(
            f"warning: without native operators {inputs.method.kind} attends from prompts to the whole capacity, "
            "which is slow: build them with scripts/build_native.sh",
            None,
        )
    kl = cache_kl = None
    if weights == "fp32" or weights == "kept":
        for file in (reference, reference.with_name(reference.name + ".data")):
            shutil.copyfile(file, folder / file.name)
    else:
        inputs.progress(f"quantising weights to {weights}", None)
        built = save_decoder(quantize_weights(reference, weights), decoder, native=choice.on)
    narrow = cache_dtype != "float32"
    if narrow:
        inputs.progress(f"measuring what {cache_dtype} caches cost", None)
        cache_kl = round(cost(reference, cache_dtype, native), 4)
    if weights != "fp32" and weights != "kept":
        inputs.progress(f"measuring what {weights} weights cost", None)
        measured = decoder
        if choice.portable_forms:
            # The same weights in a decoder that a CPU runs: this machine may have no GPU.
            measured = inputs.root / "work" / "measured" / DECODER
            save_decoder(quantize_weights(plain, weights), measured)
        kl = round(cost(measured, cache_dtype, None if choice.portable_forms else native), 4)

    def contract(path: Path, phase: Phase, groups: Iterable[int], aliases: dict[str, str]) -> GraphContract:
        model = onnx.load(path, load_external_data=False)
        file = path.relative_to(inputs.root).as_posix()
        return graph_contract(model, path.stem, phase, file, groups=groups, aliases=aliases)

    graphs = {DECODE: [contract(decoder, "decoder", range(len(inputs.groups)), built.aliases)]}
    for program in inputs.programs:
        # ONNX Runtime inlines the portable graph's functions itself, where they are not native operators.
        written = folder / Path(program.file).name
        portable = onnx.load(inputs.root / program.file)
        if choice.on and not choice.portable_forms and program.name == COMPRESS:
            heads = len(inputs.groups[program.groups[0]].heads)
            portable = inputs.method.native_compressor(inputs.model.model_copy(update={"kv_heads": heads}))
        narrowed = narrow_caches(portable, cache_dtype)
        if choice.on:
            # With a body beside it a node would run where the library is not, slowly and without a word.
            kept = [function for function in narrowed.functions if function.name not in NATIVE_PROGRAMS]
            del narrowed.functions[:]
            narrowed.functions.extend(kept)
        written.write_bytes(narrowed.SerializeToString(deterministic=True))
        graph = contract(written, "compressor", program.groups, dict(program.in_place))
        graphs.setdefault(program.name, []).append(graph)
    return OnnxRuntimeRecord(
        weights=weights,
        weight_bytes=built.weight_bytes,
        weight_kl=kl,
        cache_kl=cache_kl,
        native=choice.why,
        budgets=[
            BudgetRecord(contract=inputs.contract(target, profile, graphs, dtype=cache_dtype, native=native))
            for profile in inputs.profiles
        ],
        lint=built.lint,
    )

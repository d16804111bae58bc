"""From a checkpoint or an exported decoder to a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.budget import static_profile
from semkv_deploy.budget_units import BudgetLike, resolve_budgets
from semkv_deploy.bundle import (
    AnyTarget,
    BuiltProfile,
    Bundle,
    Manifest,
    TargetRecord,
    new_directory,
    slot_bytes,
    tool_versions,
    write_manifest,
)
from semkv_deploy.compiler import calibrate
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.exported import open_export
from semkv_deploy.passes.quantize import quantize_weights
from semkv_deploy.runtime.tokens import ChunkCounter, delimiter_table, load_tokenizer
from semkv_deploy.targets import is_tensorrt, require_available
from semkv_deploy.targets.onnxruntime.build import BuiltDecoder, copy_compressor, lower_decoder, save_decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from semkv_deploy.choices import WeightFormat
    from semkv_deploy.methods import AnyMethod
    from semkv_deploy.model.config import ModelFacts
    from semkv_deploy.passes.lower_gqa import BiasMode
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and the share of it that is done (None: unknown)."""

DEFAULT_MAX_CONTEXT = 8192


def build_bundle(
    source: str,
    out: Path,
    *,
    budgets: Sequence[BudgetLike],
    method: AnyMethod,
    max_context: int | None = None,
    target: str | Sequence[str] = "onnxruntime-cpu",
    weights: WeightFormat = "int4",
    tensorrt: TensorRTOptions | None = None,
    calibration_text: str | None = None,
    family: str | None = None,
    force: bool = False,
    progress: Progress = lambda what, share: None,
) -> Bundle:
    """Builds a bundle at `out`; nothing is left there when it fails or is interrupted.

    Args:
        source: `decoder.onnx` of an export directory, or anything `export` takes.
        budgets: shares of cache entries kept, slots or bytes (`0.2`, `1638tokens`, `64MiB`), one profile each.
        max_context: most tokens of a conversation; None: the model's, at most 8,192.
        target: one or several.
        weights: how `onnxruntime-*` targets store weights.
        tensorrt: options of the `tensorrt*` targets; None: the defaults.
        calibration_text: None: the text that ships with the package.
        family: fail unless the model is of this one (what a recipe is made for).

    Raises:
        SemkvError: on any input that cannot be built.
    """
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions, build_tensorrt, check_options

    targets = [target] if isinstance(target, str) else list(dict.fromkeys(target))
    options = tensorrt or TensorRTOptions()
    for name in targets:
        require_available(name, engines=options.engines)
        if is_tensorrt(name):
            check_options(name, options)
    portable = Path(source)
    facts = open_export(portable) if portable.suffix == ".onnx" else None
    with new_directory(out, force=force) as root:
        onnx_dir = root / "onnx"
        onnx_dir.mkdir()
        if facts is None:
            from semkv_deploy.export import export_checkpoint

            facts = export_checkpoint(source, onnx_dir, progress)
        else:
            # Copied, not linked: onnx tools refuse external data with several hard links.
            shutil.copytree(portable.parent, onnx_dir, dirs_exist_ok=True)
            (onnx_dir / portable.name).rename(onnx_dir / "decoder.onnx")
        if family is not None and family != facts.family:
            raise SemkvError(
                "the recipe is for another family of models", where=source, expected=family, got=facts.family
            )
        context = _context(max_context, facts)
        cache_types = {options.dtype if is_tensorrt(name) else facts.dtype for name in targets}
        profiles = [
            static_profile(budget, context, bytes_per_slot=facts.cache_bytes_per_token)
            for budget in resolve_budgets(budgets, context, slot_bytes(facts, cache_types))
        ]
        for name in ("tokenizer", "delimiters.json"):
            shutil.move(onnx_dir / name, root / name)
        (onnx_dir / "model.json").unlink()
        method = method.for_model(facts)
        compressor = method.compressor(facts)
        (onnx_dir / "compressor.onnx").unlink(missing_ok=True)
        if compressor is not None:
            (onnx_dir / "compressor.onnx").write_bytes(compressor.SerializeToString(deterministic=True))

        records: dict[str, AnyTarget] = {}
        reference = root / "work" / "decoder.onnx"
        progress("lowering the decoder", None)
        bias: BiasMode = "none" if not method.merges else "layer" if method.groups(facts.kv_heads) == 1 else "head"
        built = save_decoder(lower_decoder(onnx_dir / "decoder.onnx", bias=bias, layers=facts.layers), reference)
        tokens, delimiters = _calibration_tokens(root, facts, calibration_text)
        progress("calibrating", 0.0)
        logits, engine = calibrate.forward(reference, facts, tokens)
        chunk = ChunkCounter().count(delimiter_table(delimiters, facts.vocab_size)[tokens])
        curve = calibrate.kept_curve(method, facts, engine, chunk, lambda share: progress("calibrating", share))
        del engine
        built_profiles = [
            BuiltProfile(
                **profile.model_dump(), thresholds=calibrate.layer_thresholds(method, profile, curve, facts.layers)
            )
            for profile in profiles
        ]
        for name in targets:
            if is_tensorrt(name):
                records[name] = build_tensorrt(root, name, facts, method, built_profiles, options, progress)
            else:
                records[name] = _build_onnxruntime(
                    root, name, facts, reference, built, weights, tokens, logits, progress
                )
        shutil.rmtree(root / "work")
        progress("writing the manifest", None)
        manifest = Manifest(
            model=facts,
            method=method,
            max_context=context,
            profiles=built_profiles,
            calibration=curve,
            targets=records,
            versions=tool_versions(),
            files={},
        )
        write_manifest(root, manifest)
    return Bundle(out, manifest)


def _context(max_context: int | None, facts: ModelFacts) -> int:
    limit = facts.max_position
    context = min(limit, DEFAULT_MAX_CONTEXT) if max_context is None else max_context
    if not 0 < context <= limit:
        what = "beyond the model's context" if context > limit else "out of range"
        raise SemkvError(what, where="--max-context", expected=f"1 to {limit} tokens", got=context)
    return context


def _calibration_tokens(root: Path, facts: ModelFacts, text: str | None) -> tuple[list[int], list[int]]:
    """The text to calibrate on, as tokens, and the delimiters' token ids."""
    tokenizer = load_tokenizer(root)
    text = text if text is not None else calibrate.calibration_text()
    tokens = tokenizer.encode(text, add_special_tokens=False)[: min(calibrate.MAX_TOKENS, facts.max_position)]
    if len(tokens) < 64:
        raise SemkvError(
            "too short to calibrate on", where="--calibration-text", expected="64 tokens or more", got=len(tokens)
        )
    return tokens, json.loads((root / "delimiters.json").read_text(encoding="utf-8"))["token_ids"]


def _build_onnxruntime(
    root: Path,
    target: str,
    facts: ModelFacts,
    reference: Path,
    built: BuiltDecoder,
    weights: WeightFormat,
    tokens: list[int],
    logits: NDArray[np.float32],
    progress: Progress,
) -> TargetRecord:
    """Quantises the lowered float32 decoder at `reference`; `logits` are what that one gives on `tokens`."""
    folder = root / "targets" / target
    folder.mkdir(parents=True)
    decoder = folder / "decoder.onnx"
    kl = None
    if weights == "fp32":
        for file in (reference, reference.with_name(reference.name + ".data")):
            shutil.copyfile(file, folder / file.name)
    else:
        progress(f"quantising weights to {weights}", None)
        built = save_decoder(quantize_weights(reference, weights), decoder)
        progress(f"measuring what {weights} weights cost", None)
        kl = round(calibrate.mean_kl(logits, calibrate.forward(decoder, facts, tokens)[0]), 4)
    compressor = root / "onnx" / "compressor.onnx"
    if compressor.exists():
        copy_compressor(compressor, folder / "compressor.onnx")
    return TargetRecord(
        decoder=decoder.relative_to(root).as_posix(),
        compressor=(folder / "compressor.onnx").relative_to(root).as_posix() if compressor.exists() else None,
        aliases=built.aliases,
        weights=weights,
        weight_bytes=built.weight_bytes,
        weight_kl=kl,
        lint=built.lint,
    )

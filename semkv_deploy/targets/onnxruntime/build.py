"""Builds the `onnxruntime-*` artefacts of a bundle: lowers, quantises, lints, and proves the caches are in place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.aliases import alias_map, check_alias_safety
from semkv_deploy.lint.onnxruntime import lint_onnxruntime

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.passes.lower_gqa import BiasMode


class BuiltDecoder(NamedTuple):
    """A lowered decoder on disk: its alias map, bytes of weights, and lint findings that did not stop the build."""

    aliases: dict[str, str]
    weight_bytes: int
    lint: list[str]


def lower_decoder(portable: Path, *, bias: BiasMode, layers: int) -> onnx.ModelProto:
    """The decoder for ONNX Runtime, weights loaded, in float32.

    Raises:
        SemkvError: when not every layer's attention was lowered.
    """
    import onnx_ir as ir
    from onnxscript.optimizer import optimize

    from semkv_deploy.passes.fuse import fuse_for_onnxruntime
    from semkv_deploy.passes.lower_gqa import lower_to_gqa

    model = ir.load(portable)
    fuse_for_onnxruntime(model)
    lowered = lower_to_gqa(model, bias=bias)
    optimize(model)
    found = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    if not lowered == found == layers:
        raise SemkvError("attention was lost while lowering", where=portable.name, expected=layers, got=found)
    ir.external_data.load_to_model(model)
    return ir.to_proto(model)


def save_decoder(model: onnx.ModelProto, path: Path) -> BuiltDecoder:
    """Checks and writes a lowered decoder with one external-data file beside it; `model` is spent afterwards.

    Raises:
        SemkvError: when lint finds something that would make the target wrong, or an append in place is not safe.
    """
    import onnx

    findings = lint_onnxruntime(model)
    for finding in findings:
        if finding.fatal:
            raise SemkvError(finding.what, where=finding.node, fix=finding.fix)
    aliases = alias_map(model.graph)
    check_alias_safety(model.graph, aliases)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    onnx.save(model, path, save_as_external_data=True, location=data.name)
    return BuiltDecoder(aliases, data.stat().st_size, [str(finding) for finding in findings])


def copy_compressor(portable: Path, target: Path) -> None:
    """The compressor as this target runs it: ONNX Runtime inlines the portable graph's functions itself."""
    shutil.copyfile(portable, target)

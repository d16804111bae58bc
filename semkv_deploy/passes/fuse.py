"""Fuses what exporting decomposed: RMS norms, residual adds and rotary embeddings, for ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer import optimize
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.rotary_embedding import fuse_rotary_embedding
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

from semkv_deploy.graph.editing import GraphEditor, replace, sole, static
from semkv_deploy.ops import DOMAIN

_FUSION_DOMAIN = "ai.onnxruntime._fusion"


def fuse_for_onnxruntime(model: ir.Model) -> dict[str, int]:
    """Rewrites the model in place and returns how often each fusion applied.

    A pattern that does not occur is left as exported: slower, never wrong. The bodies of `semkv` operators are taken
    out first, because optimising inlines every function that has one.
    """
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    common_passes.ShapeInferencePass()(model)
    counts = {
        "rms_normalization": fuse_rms_normalization(model),
        "skip_rms_normalization": fuse_skip_rms_normalization(model),
        "rotary_embedding": fuse_rotary_embedding(model),
    }
    _use_standard_rotary_embedding(model)
    optimize(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    return counts


def _use_standard_rotary_embedding(model: ir.Model) -> None:
    """onnxscript's fused rotary embedding (full-width cos and sin) as the operator of opset 23 (half-width)."""
    edit = GraphEditor(model.graph, "rope")
    halves: dict[ir.Value, ir.Value] = {}

    def half(table: ir.Value, node: ir.Node, width: int) -> ir.Value:
        if table not in halves:
            unsqueeze = sole(table, "Unsqueeze")
            assert unsqueeze is not None
            ends = [edit.constant([bound], np.int64) for bound in (0, width, 2)]
            (halves[table],) = edit.node(node, "Slice", [unsqueeze.inputs[0], *ends])
        return halves[table]

    for node in list(model.graph):
        if node.domain != _FUSION_DOMAIN or node.op_type != "RotaryEmbedding":
            continue
        rotated, cos, sin = node.inputs
        assert rotated is not None and cos is not None and sin is not None
        if sole(cos, "Unsqueeze") is None or sole(sin, "Unsqueeze") is None:
            continue
        width = static(rotated, 3) // 2
        replace(node, edit.node(node, "RotaryEmbedding", [rotated, half(cos, node, width), half(sin, node, width)]))

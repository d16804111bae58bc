"""From a value back to where its rows come from: is it, slot by slot, an appended cache?"""

from __future__ import annotations

import onnx

from semkv_deploy.lint.tensorrt.view import View

_FIRST = """
Cast Clip DequantizeLinear Expand Flatten Gather GatherElements GatherND Identity LayerNormalization Neg Pad
QuantizeLinear RMSNormalization Reshape RotaryEmbedding SimplifiedLayerNormalization Slice Split Squeeze Tile Transpose
Unsqueeze
"""

FIRST = frozenset(_FIRST.split())
"""Operators whose result holds rows of their first operand, moved or changed row by row."""

ANY = frozenset({"Add", "Concat", "Div", "Mul", "Sub"})
"""Operators whose result holds rows of each operand."""

APPENDS = ("TensorScatter", "TRT_KVCacheUpdate")


def through_identity(view: View, name: str | None) -> str | None:
    """The value that a chain of Identity nodes hands on."""
    seen = set()
    while name and name not in seen and (maker := view.producer.get(name)) is not None and maker.op_type == "Identity":
        seen.add(name)
        name = next(iter(maker.input), None)
    return name or None


def from_cache(view: View, name: str | None) -> bool:
    """Whether a value holds rows of an appended cache, or of a past joined with new rows.

    Rows are followed through layout, selection, arithmetic and projections by a weight (keys made from a latent cache),
    not through an attention: what it hands on is a row of the query.
    """
    pending, seen = [name], {None, ""}
    while pending:
        name = pending.pop()
        if name in seen or name is None:
            continue
        seen.add(name)
        maker = view.producer.get(name)
        if maker is None:
            continue
        if maker.op_type in APPENDS:
            return True
        if maker.op_type == "Concat" and any(through_identity(view, part) in view.inputs for part in maker.input):
            return True
        pending += _sources(view, maker)
    return False


def _sources(view: View, node: onnx.NodeProto) -> list[str]:
    operands = list(node.input)
    if node.op_type in FIRST:
        return operands[:1]
    if node.op_type in ANY:
        return operands
    if node.op_type == "Where":
        return operands[1:]
    if node.op_type == "MatMul" and len(operands) == 2 and _is_weight(view, operands[1]):
        return operands[:1]
    return []


def _is_weight(view: View, name: str) -> bool:
    seen: set[str] = set()
    while (
        name not in seen and (maker := view.producer.get(name)) is not None and maker.op_type in FIRST and maker.input
    ):
        seen.add(name)
        name = maker.input[0]
    maker = view.producer.get(name)
    return maker.op_type in ("Constant", "ConstantOfShape") if maker is not None else name not in view.inputs

"""Attention that a quantiser rounds to 8 bits, as static quantisation of every MatMul does: computed in float32 again.

Quantised weights stay as they are, and so does whatever rounds what they are multiplied by. Products of two
activations are attention's; what rounds their operands and results (`QuantizeLinear`, `DequantizeLinear`) goes, for
`NexusAttention` takes floats. The proof compares both sides without any rounding of activations.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, sole

_INTEGER = ("QLinearMatMul", "QAttention", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
"""Operators that round within; nothing tells them from their float32 form."""


def float_attention(graph: ir.Graph) -> int:
    """Takes rounding out of products of two activations, in place; returns out of how many.

    Raises:
        SemkvError: for a cache that the graph rounds, and for operators that round within.
    """
    for node in graph:
        if node.op_type in _INTEGER:
            raise SemkvError(
                "a product in integers that the importer does not know",
                where=node.name,
                expected="QuantizeLinear and DequantizeLinear around MatMul, MatMulInteger or MatMulNBits",
                got=node.op_type,
                fix="quantise with quant_format=QuantFormat.QDQ, or quantize_dynamic",
            )
    for given in graph.inputs:
        rounds = next((use.node for use in given.uses() if use.node.op_type == "QuantizeLinear"), None)
        if rounds is not None and given.shape is not None and len(given.shape) == 4:
            raise SemkvError(
                "a cache that the graph rounds to 8 bits itself",
                where=rounds.name,
                expected="a cache that attention reads as it is",
                got=given.name,
                fix='quantise with op_types_to_quantize=["MatMul"]; build has --cache-dtype int8 of its own',
            )
    count = 0
    for node in graph:
        if node.op_type != "MatMul" or node.domain or any(_is_weight(value) for value in node.inputs):
            continue
        for place, value in enumerate(node.inputs):
            before = _before(value)
            if before is not value:
                node.replace_input_with(place, before)
        for result in [use.node for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"]:
            for use in [each.node for each in result.outputs[0].uses() if each.node.op_type == "DequantizeLinear"]:
                ir.convenience.replace_all_uses_with(use.outputs[0], node.outputs[0], replace_graph_outputs=True)
        count += 1
    return count


def unsigned_activations(graph: ir.Graph) -> int:
    """Lets what rounds activations to int8 round to uint8 with 128 more as zero, in place; returns how many did.

    The values are the same. From opset 21 on ONNX Runtime (1.32) loads no such pair of int8 that is followed by a
    Reshape or Transpose: its optimizer makes uint8 of it and leaves the type that it was.
    """
    edit, count = GraphEditor(graph, "unsigned"), 0
    for node in graph:
        zero = node.inputs[2] if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
        tensor = None if zero is None else ir.convenience.get_const_tensor(zero)
        readers = [use.node for use in node.outputs[0].uses()]
        if tensor is None or tensor.dtype != ir.DataType.INT8 or "output_dtype" in node.attributes:
            continue
        if any(reader.op_type != "DequantizeLinear" or reader.inputs[2] is not zero for reader in readers):
            continue
        moved = edit.constant(tensor.numpy().astype(np.int16) + 128, np.uint8)
        for each in (node, *readers):
            each.replace_input_with(2, moved)
        node.outputs[0].dtype = ir.DataType.UINT8
        count += 1
    return count


def _before(value: ir.Value | None) -> ir.Value | None:
    """A value before it was rounded."""
    after = sole(value, "DequantizeLinear")
    rounded = sole(after.inputs[0], "QuantizeLinear") if after else None
    return value if rounded is None else rounded.inputs[0]


def _is_weight(value: ir.Value | None) -> bool:
    """Whether an operand is a weight, quantised or not, whatever its layout."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Constant":
            return True
        if node.op_type not in ("DequantizeLinear", "Transpose", "Cast", "Identity", "Reshape"):
            return False
        value = node.inputs[0]
    return value is not None and value.is_initializer()

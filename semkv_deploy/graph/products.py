"""Products by quantised weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

FLOAT32_ACTIVATIONS = 1
"""MatMulNBits' `accuracy_level`; at 4 its kernels round activations to 8 bits."""


def use_float32_activations(model: onnx.ModelProto) -> None:
    """In place: products take activations as they are, so that no difference in a last bit is made one of a percent."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = FLOAT32_ACTIVATIONS

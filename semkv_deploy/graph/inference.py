"""Types and shapes of a graph's values, by ONNX's own inference."""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnx_ir.passes.common as common

_LOGGER = logging.getLogger("onnx_ir.passes.common.shape_inference")


def infer_types(model: ir.Model) -> None:
    """States types and shapes that follow from operators, in place; what does not follow stays as it was.

    Shapes that a graph states of its constants are not believed: onnxruntime-genai's builder (0.18) calls `[1]` a
    scalar, on which the whole inference fails.
    """
    for node in model.graph.all_nodes():
        tensor = node.attributes["value"].value if node.op_type == "Constant" and "value" in node.attributes else None
        if isinstance(tensor, ir.TensorProtocol):
            node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
    level = _LOGGER.level
    _LOGGER.setLevel(logging.ERROR)  # where it fails it logs a traceback, and the model is as it was
    try:
        common.ShapeInferencePass()(model)
    finally:
        _LOGGER.setLevel(level)

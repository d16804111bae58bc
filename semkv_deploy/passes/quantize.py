"""Weight-only quantisation of a lowered decoder, by onnxruntime's own quantiser."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray


BLOCK_SIZE = 32


def quantize_weights(path: Path, weights: Literal["int8", "int4"]) -> onnx.ModelProto:
    """The model at `path` with its constant MatMuls as `MatMulNBits` (blocks of 32, int8 activations in the kernel).

    Its token embedding becomes `GatherBlockQuantized` of 8 bits for either format: it is read a row a token, so that
    fewer bits save no time, and every layer sees its error. A head that is the embedding transposed becomes a product
    of 8 bits as well: it decides the token, and is a fifth of a small model.

    Symmetric: zero points gain no accuracy on SmolLM2 and cost a quarter more time a token; float zero points (HQQ)
    would be exact for GGUF's Q4_1 but take a kernel that is 8 times slower.
    """
    import onnx

    model = onnx.load(path)
    tied = fold_transposed_weights(model)
    model = _quantize_products(model, {"int8": 8, "int4": 4}[weights], excluded=tied)
    if tied:
        model = _quantize_products(model, 8)
    quantize_embedding(model)
    return model


def _quantize_products(model: onnx.ModelProto, bits: int, excluded: Sequence[str] = ()) -> onnx.ModelProto:
    """Replaces MatMuls with constant weights, except those of these names."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    logging.getLogger(nbits.__name__).setLevel(logging.WARNING)
    quantizer = nbits.MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        # Level 4 multiplies in int8, as onnxruntime-genai's CPU models do; level 0 is 4 times slower here.
        accuracy_level=4,
        nodes_to_exclude=list(excluded),
    )
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def fold_transposed_weights(model: onnx.ModelProto) -> list[str]:
    """Gives a MatMul by a constant's transpose a constant of its own; returns the names of such MatMuls."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    transposes = {
        node.output[0]: node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights
    }
    folded = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in transposes:
            table = weights[transposes[node.input[1]].input[0]]
            if len(table.dims) != 2:
                continue
            name = f"{table.name}.transposed"
            if not any(tensor.name == name for tensor in graph.initializer):
                graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(table).T.copy(), name))
            node.input[1] = name
            folded.append(node.name)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for output, node in transposes.items():
        if output not in used:
            graph.node.remove(node)
    return folded


def quantize_embedding(model: onnx.ModelProto) -> int:
    """Replaces each Gather of rows of a constant float32 table with `GatherBlockQuantized` of 8 bits, blocks of 32.

    A table that other nodes read, or whose rows are no multiple of a block, stays as it is.

    Returns:
        How many tables were replaced.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[1] % BLOCK_SIZE == 0
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    replaced = 0
    for name, tensor in tables.items():
        nodes = readers.get(name, [])
        if not nodes or any(node.op_type != "Gather" or node.input[0] != name or _axis(node) for node in nodes):
            continue
        codes, scales = _eight_bits(numpy_helper.to_array(tensor))
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(codes, f"{name}_Q8"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scales"))
        for node in nodes:
            node.op_type, node.domain = "GatherBlockQuantized", "com.microsoft"
            node.input[:] = [f"{name}_Q8", node.input[1], f"{name}_scales"]
            del node.attribute[:]
            settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK_SIZE, "bits": 8}
            node.attribute.extend(helper.make_attribute(key, value) for key, value in settings.items())
        replaced += 1
    return replaced


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _eight_bits(table: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes `[V,H]` around 128 and scales `[V,H/32]` of a table `[V,H]`, some rows at a time."""
    import numpy as np

    rows, width = table.shape
    codes = np.empty((rows, width), np.uint8)
    scales = np.empty((rows, width // BLOCK_SIZE), np.float32)
    for start in range(0, rows, 4096):
        part = table[start : start + 4096].reshape(-1, width // BLOCK_SIZE, BLOCK_SIZE)
        scale = np.abs(part).max(-1) / 127
        scales[start : start + 4096] = scale
        ratio = part / np.where(scale > 0, scale, 1)[..., None]
        codes[start : start + 4096] = (np.rint(ratio) + 128).astype(np.uint8).reshape(-1, width)
    return codes, scales


def float32_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph's constants that are float32 (scales included), whether their data is loaded or not."""
    import math

    from onnx import TensorProto

    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    return sum(4 * math.prod(tensor.dims) for tensor in floats)

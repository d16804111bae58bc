"""Weight-only quantisation of a lowered decoder, by onnxruntime's own quantiser, one weight at a time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from semkv_deploy.methods.sonic_decoder import PREFIX

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray


BLOCK_SIZE = 32
_DOMAIN = "com.microsoft"


def quantize_weights(path: Path, weights: Literal["int8", "int4"]) -> ir.Model:
    """The model at `path` with its constant MatMuls as `MatMulNBits` (blocks of 32, int8 activations in the kernel).

    Its token embedding becomes `GatherBlockQuantized` of 8 bits for either format: it is read a row a token, so that
    fewer bits save no time, and every layer sees its error. A head that is the embedding transposed becomes a product
    of 8 bits as well: it decides the token, and is a fifth of a small model.

    Symmetric: zero points gain no accuracy on SmolLM2 and cost a quarter more time a token; float zero points (HQQ)
    would be exact for GGUF's Q4_1 but take a kernel that is 8 times slower.

    Weights are mapped and let go one by one: what is in memory at the end is what was quantised.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    from semkv_deploy.graph.editing import static

    model = ir.load(path)
    graph = model.graph
    graph.opset_imports[_DOMAIN] = 1
    bits = {"int8": 8, "int4": 4}[weights]
    done: dict[tuple[str, bool], tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        found = _constant_factor(node)
        if found is None:
            continue
        weight, transposed = found
        own = 8 if transposed else bits
        key = (str(weight.name), transposed)
        if key not in done:
            done[key] = _quantized(graph, weight, own, transposed=transposed)
        rows, columns = static(weight, 0), static(weight, 1)
        _replace_product(node, *done[key], sizes=(columns, rows) if transposed else (rows, columns), bits=own)
    common.RemoveUnusedNodesPass()(model)
    quantize_embedding(model)
    return model


def _constant_factor(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The matrix that a product is by, and whether by its transpose; None: the node is no product by a constant."""
    from semkv_deploy.graph.editing import sole

    weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
    if weight is None:
        return None
    turn = sole(weight, "Transpose")
    source = weight if turn is None else turn.inputs[0]
    if source is None or not source.is_initializer() or source.shape is None or source.shape.rank() != 2:
        return None
    return source, turn is not None


def _quantized(graph: ir.Graph, weight: ir.Value, bits: int, *, transposed: bool) -> tuple[ir.Value, ir.Value]:
    """Codes `[N,K/32,bytes]` and scales `[N,K/32]` of a matrix `[K,N]`, as initializers."""
    import numpy as np

    quantizer = _quantizer(bits)
    name = f"{weight.name}.transposed" if transposed else str(weight.name)
    array = _array(weight)
    codes, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(array.T) if transposed else array)
    del array
    _let_go(weight)
    return _initializer(graph, f"{name}_Q{bits}", codes), _initializer(graph, f"{name}_scales", scales)


def _quantizer(bits: int) -> Any:
    """onnxruntime's quantiser of matrices."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    # Importing it sets up logging for the whole process, and every library's remarks would be printed.
    root.setLevel(level)
    root.handlers[:] = handlers
    config = nbits.DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=bits)
    return nbits.DefaultWeightOnlyQuantizer(config)


def _replace_product(node: ir.Node, codes: ir.Value, scales: ir.Value, *, sizes: tuple[int, int], bits: int) -> None:
    from semkv_deploy.graph.editing import GraphEditor, replace

    assert node.graph is not None
    product = GraphEditor(node.graph, "quantised").node(
        node,
        "MatMulNBits",
        [node.inputs[0], codes, scales],
        domain=_DOMAIN,
        name=f"{node.name}_Q{bits}",
        K=sizes[0],
        N=sizes[1],
        bits=bits,
        block_size=BLOCK_SIZE,
        # Level 4 multiplies in int8, as onnxruntime-genai's CPU models do; level 0 is 4 times slower here.
        accuracy_level=4,
    )
    product[0].shape, product[0].type = node.outputs[0].shape, node.outputs[0].type
    replace(node, product)


def quantize_embedding(model: ir.Model) -> int:
    """Replaces each Gather of rows of a constant float32 table with `GatherBlockQuantized` of 8 bits, blocks of 32.

    A table that other nodes read, whose rows are no multiple of a block, or of Nexus rows, stays as it is.

    Returns:
        How many tables were replaced.
    """
    import onnx_ir as ir

    from semkv_deploy.graph.editing import GraphEditor, replace, static

    graph = model.graph
    edit = GraphEditor(graph, "embedding")
    replaced = 0
    for table in list(graph.initializers.values()):
        shape, nodes = table.shape, [use.node for use in table.uses()]
        if table.dtype != ir.DataType.FLOAT or shape is None or shape.rank() != 2 or static(table, 1) % BLOCK_SIZE:
            continue
        if (
            (table.name or "").startswith(f"{PREFIX}.")
            or not nodes
            or any(node.op_type != "Gather" or node.inputs[0] is not table or _axis(node) for node in nodes)
        ):
            continue
        array = _array(table)
        codes, scales = _eight_bits(array)
        del array
        _let_go(table)
        stored = [_initializer(graph, f"{table.name}_Q8", codes), _initializer(graph, f"{table.name}_scales", scales)]
        for node in nodes:
            settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK_SIZE, "bits": 8}
            inputs = [stored[0], node.inputs[1], stored[1]]
            rows = edit.node(node, "GatherBlockQuantized", inputs, domain=_DOMAIN, name=node.name, **settings)
            rows[0].shape, rows[0].type = node.outputs[0].shape, node.outputs[0].type
            replace(node, rows)
        del graph.initializers[str(table.name)]
        replaced += 1
    return replaced


def _initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _let_go(value: ir.Value) -> None:
    """Unmaps a weight's file: its pages leave the process's memory. It is mapped again if it is read again."""
    import onnx_ir as ir

    if isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


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

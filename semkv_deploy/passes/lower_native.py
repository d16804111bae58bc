"""Lowers `semkv::NexusAttention` to standard operators that TensorRT runs fused: TensorScatter and Attention.

What decides the form (measured on TensorRT-RTX 1.7.1, `tests/targets`):

* A `TensorScatter` becomes an in-place cache update when its cache is a graph input, its result a graph output, and the
  capacity static.
* KV heads lie in the batch axis ("folded": cache `[B*Hkv,1,C,D]`, query `[B*Hkv,G,S,D]`), so that a slot's bias per KV
  head is one mask row for its G query heads. With G = 1 that has no fused kernel for several rows; then nothing is
  folded. Either way the cache's bytes lie as `[B,Hkv,C,D]`.
* The importer ignores `nonpad_kv_seqlen` and windows, and `is_causal` counts from the first slot: all three are in a
  float mask, which is made from `length`, never from a shape.
* An indexed attention of one row reads the rows of its slots by `GatherND` from the appended caches: the append stays
  in place, and what is gathered goes into the fused attention (measured likewise).
* Soft caps are refused, and some shapes have no fused kernel (`_has_kernel`): such layers are decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, attribute, replace, static
from semkv_deploy.methods.attention_nodes import (
    capacity_of,
    drop_slot_biases,
    is_indexed,
    require_plain,
    required_attention_nodes,
)
from semkv_deploy.methods.base import BiasMode
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN
from semkv_deploy.passes.selection import gather_rows, mask_of_a_step, require_no_bias, slots_of_a_step

FOLDED_ROWS = names.FOLDED_ROWS

MASK_FLOOR = {ir.DataType.FLOAT: -1e30, ir.DataType.FLOAT16: -60000.0, ir.DataType.BFLOAT16: -1e30}
"""What stands for -inf in a mask: finite, because a tile in which all is masked must not become NaN.

So a dead slot shows in float16 where its key's scaled product with a query exceeds the floor; keys of a model are far
from that, and compressors leave zeros.
"""


def folded_rows(kv_heads: int) -> str:
    """Symbol of the first axis of a cache whose heads lie in it: batch x `kv_heads`."""
    return f"{FOLDED_ROWS}{kv_heads}"


class Promise(NamedTuple):
    """A layer that TensorRT's network must have: its kind (`trt.LayerType`) and the ONNX node it comes from."""

    kind: str
    node: str


def lower_to_native(model: ir.Model, *, bias: BiasMode, dims: Mapping[str, int]) -> list[Promise]:
    """Replaces every `NexusAttention` in place.

    Args:
        model: a decoder without `semkv` functions, caches in its final type.
        bias: what the method promises of slot biases; with "none" the `slot_bias` inputs go away.
        dims: static sizes by symbol; every capacity must be among them.

    Returns:
        The layers that TensorRT must make of it, in order.

    Raises:
        SemkvError: when the graph has no such node, or the capacity is missing.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    set_dims(model, dims)
    edit = GraphEditor(graph, "native")
    rows = _SharedRows(edit, nodes[0], graph.inputs[0])
    shared: dict[object, _Shared] = {}
    promises = []
    for node in nodes:
        capacity = capacity_of(node)
        if capacity not in shared:
            shared[capacity] = _Shared(edit, node, rows)
        promises += _lower(node, edit, shared[capacity], bias)
    if not any(node.domain == DOMAIN for node in graph):
        model.opset_imports.pop(DOMAIN, None)
    if bias == "none":
        drop_slot_biases(graph)
    return promises


def set_dims(model: ir.Model, dims: Mapping[str, int]) -> None:
    """Makes symbolic sizes static, in every value of the graph.

    Raises:
        SemkvError: when the cache's capacity would stay dynamic.
    """
    graph = model.graph
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                dims.get(size.value or "", size) if isinstance(size, ir.SymbolicDim) else size for size in value.shape
            )
    for value in graph.inputs:
        if names.is_cache_input(value.name) and not isinstance(value.shape and value.shape[2], int):
            raise SemkvError(
                "the capacity is dynamic",
                where=value.name,
                expected="a static number of slots: TensorRT appends in place only then",
                got=value.shape and value.shape[2],
                fix="build with --budget, one engine a budget",
            )


class _SharedRows:
    """What every layer's mask needs of a run's rows, computed once."""

    def __init__(self, edit: GraphEditor, first: ir.Node, input_ids: ir.Value) -> None:
        assert input_ids.shape is not None
        rows = input_ids.shape[1]
        self.one_row = rows == 1
        if isinstance(rows, int):
            self.row = edit.constant(np.arange(rows)[:, None], np.int64)
            self.rows = edit.constant(rows, np.int64)
        else:
            count = edit.node(first, "Shape", [input_ids], start=1, end=2)[0]
            self.rows = edit.node(first, "Squeeze", [count])[0]
            zero, one = edit.constant(0, np.int64), edit.constant(1, np.int64)
            row = edit.node(first, "Range", [zero, self.rows, one])[0]
            self.row = edit.node(first, "Unsqueeze", [row, edit.constant([1], np.int64)])[0]


class _Shared:
    """What the masks of one capacity need, computed once."""

    def __init__(self, edit: GraphEditor, first: ir.Node, rows: _SharedRows) -> None:
        key_cache = first.inputs[3]
        assert key_cache is not None
        self.one_row, self.row, self.rows = rows.one_row, rows.row, rows.rows
        self.capacity = static(key_cache, 2)
        self.batch = key_cache.shape[0] if key_cache.shape is not None else None
        self.slot = edit.constant(np.arange(self.capacity), np.int64)


def _lower(node: ir.Node, edit: GraphEditor, shared: _Shared, bias: BiasMode) -> list[Promise]:
    index = node.inputs[7] if is_indexed(node) else None
    if index is None:
        require_plain(node)
    else:
        require_no_bias(node, bias)
    query, key, value, key_cache, value_cache, slot_bias, length = node.inputs[:7]
    assert query is not None and key is not None and value is not None and length is not None
    assert key_cache is not None and value_cache is not None and node.name is not None
    heads, kv_heads, head_dim = static(query, 1), static(key_cache, 1), static(key_cache, 3)
    group = heads // kv_heads
    folded = group > 1
    element = key_cache.dtype
    assert element is not None

    def reshape(source: ir.Value, *shape: int) -> ir.Value:
        return edit.node(node, "Reshape", [source, edit.constant(shape, np.int64)])[0]

    write_index = length
    if folded:
        column = edit.node(node, "Unsqueeze", [length, edit.constant([1], np.int64)])[0]
        each_head = edit.node(node, "Expand", [column, edit.constant([1, kv_heads], np.int64)])[0]
        write_index = reshape(each_head, -1)
        key, value = reshape(key, -1, 1, 0, head_dim), reshape(value, -1, 1, 0, head_dim)
        query = reshape(query, -1, group, 0, head_dim)
        rows: int | str = shared.batch * kv_heads if isinstance(shared.batch, int) else folded_rows(kv_heads)
        for cache in (key_cache, value_cache):
            cache.shape = ir.Shape([rows, 1, shared.capacity, head_dim])
    layer = node.name.removesuffix(".attention")
    promises, appended = [], []
    for part, cache, new in (("key", key_cache, key), ("value", value_cache, value)):
        name = f"{layer}.{part}_append"
        (result,) = edit.node(node, "TensorScatter", [cache, new, write_index], name=name, axis=-2, mode="linear")
        result.shape, result.type = cache.shape, ir.TensorType(element)
        appended.append(result)
        promises.append(Promise("KV_CACHE_UPDATE", name))

    read = appended
    if index is None:
        mask = _mask(node, edit, shared, bias, slot_bias, length, kv_heads, folded)
    else:
        if not shared.one_row:
            raise SemkvError("chosen slots are for one row", where=node.name, expected="a graph of steps alone")
        slots = slots_of_a_step(edit, node, index, length, kv_heads)
        window, floor = attribute(node, "window", 0), MASK_FLOOR[element]
        mask = edit.node(node, "Cast", [mask_of_a_step(edit, node, slots, length, window, floor)], to=int(element))[0]
        if folded:
            width = static(index, 2) + 1
            slots, mask = reshape(slots, -1, 1, width), reshape(mask, -1, 1, 1, width)
        read = [gather_rows(edit, node, cache, slots) for cache in appended]
    scale = attribute(node, "scale", 0.0) or head_dim**-0.5
    softcap = attribute(node, "softcap", 0.0)
    name, node.name = node.name, f"{node.name}.lowered"
    if softcap > 0 or not _has_kernel(element, heads, head_dim, one_row=shared.one_row):
        output = _decomposed(node, edit, query, read[0], read[1], mask, scale, softcap, name, element)
        promises.append(Promise("MATRIX_MULTIPLY", name))
    else:
        (output,) = edit.node(node, "Attention", [query, *read, mask], name=name, scale=scale)
        promises.append(Promise("ATTENTION_INPUT", name))
    if folded:
        output = reshape(output, -1, heads, 0, head_dim)
    old = node.outputs[1:]
    for result, previous in zip(appended, old, strict=True):
        previous.shape = result.shape
    replace(node, [output, *appended])
    return promises


def _has_kernel(element: ir.DataType, heads: int, head_dim: int, *, one_row: bool) -> bool:
    """Whether the builder has attention kernels (RTX 1.7.1; `tests/lint/test_tensorrt_rules.py` asks it).

    Head sizes in eights up to 256; with one row, four query heads at least; in float32, one row only.
    """
    return head_dim % 8 == 0 and 16 <= head_dim <= 256 and heads >= 4 and (one_row or element != ir.DataType.FLOAT)


def _mask(
    node: ir.Node,
    edit: GraphEditor,
    shared: _Shared,
    bias: BiasMode,
    slot_bias: ir.Value | None,
    length: ir.Value,
    kv_heads: int,
    folded: bool,
) -> ir.Value:
    """`[B*Hkv,1,S,C]` folded, else `[B,1 or Hkv,S,C]`: biases of live slots, 0 for new rows, the floor elsewhere."""
    element = node.inputs[3].dtype if node.inputs[3] is not None else None
    assert element is not None
    floor, zero = edit.constant(MASK_FLOOR[element], np.float32), edit.constant(0.0, np.float32)
    start = edit.node(node, "Unsqueeze", [length, edit.constant([1, 2, 3], np.int64)])[0]
    start = edit.node(node, "Add", [start, _nothing(node, edit, element)])[0]
    position = edit.node(node, "Add", [start, shared.row])[0]
    if attribute(node, "causal", 1):
        hidden = edit.node(node, "Greater", [shared.slot, position])[0]
    else:
        end = edit.node(node, "Add", [start, shared.rows])[0]
        past_end = edit.node(node, "GreaterOrEqual", [shared.slot, end])[0]
        # ONNX Runtime wants as many rows in the mask as in the query.
        no_row = edit.node(node, "Less", [shared.row, edit.constant(0, np.int64)])[0]
        hidden = edit.node(node, "Or", [past_end, no_row])[0]
    if (window := attribute(node, "window", 0)) > 0:
        edge = edit.node(node, "Sub", [position, edit.constant(window, np.int64)])[0]
        too_old = edit.node(node, "LessOrEqual", [shared.slot, edge])[0]
        hidden = edit.node(node, "Or", [hidden, too_old])[0]
    live = zero
    if bias != "none":
        assert slot_bias is not None
        if bias == "group" and not folded:
            ends = [edit.constant([bound], np.int64) for bound in (0, 1, 1)]
            slot_bias = edit.node(node, "Slice", [slot_bias, *ends])[0]
        row_axis = edit.node(node, "Unsqueeze", [slot_bias, edit.constant([2], np.int64)])[0]
        finite = edit.node(node, "Max", [row_axis, floor])[0]
        is_old = edit.node(node, "Less", [shared.slot, start])[0]
        live = edit.node(node, "Where", [is_old, finite, zero])[0]
    mask = edit.node(node, "Where", [hidden, floor, live])[0]
    if folded:
        if bias == "none":
            mask = edit.node(node, "Expand", [mask, edit.constant([1, kv_heads, 1, 1], np.int64)])[0]
        shape = edit.constant([-1, 1, 0, shared.capacity], np.int64)
        mask = edit.node(node, "Reshape", [mask, shape])[0]
    if element == ir.DataType.FLOAT:
        return mask
    return edit.node(node, "Cast", [mask], to=int(element))[0]


def _nothing(node: ir.Node, edit: GraphEditor, element: ir.DataType) -> ir.Value:
    """`[B,1,1,1]` zeros that depend on the layer's keys, so that its mask is made when its turn comes.

    A mask needs no activations, and a scheduler makes all layers' masks before the first layer runs: on RTX 1.7.1 that
    is 49 MB of activations for SmolLM2's prefill, not 12, and it grows with layers x slots.
    """
    corner = [edit.constant(bounds, np.int64) for bounds in ([0, 0, 0], [1, 1, 1], [1, 2, 3])]
    key = edit.node(node, "Slice", [node.inputs[1], *corner])[0]
    size = edit.node(node, "Abs", [key])[0]
    nothing = edit.node(node, "Min", [size, edit.constant(0.0, element.numpy())])[0]
    return edit.node(node, "Cast", [nothing], to=int(ir.DataType.INT64))[0]


def _decomposed(
    node: ir.Node,
    edit: GraphEditor,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    scale: float,
    softcap: float,
    name: str,
    element: ir.DataType,
) -> ir.Value:
    """Attention by two products and a float32 softmax, for what has no fused kernel."""
    wide = int(ir.DataType.FLOAT)
    transposed = edit.node(node, "Transpose", [key], perm=[0, 1, 3, 2])[0]
    # Scaled before the product, which could overflow float16 otherwise.
    factor = edit.constant(scale / softcap if softcap > 0 else scale, element.numpy())
    scaled = edit.node(node, "Mul", [query, factor])[0]
    products = edit.node(node, "MatMul", [scaled, transposed], name=name)[0]
    logits = edit.node(node, "Cast", [products], to=wide)[0]
    if softcap > 0:
        logits = edit.node(node, "Tanh", [logits])[0]
        logits = edit.node(node, "Mul", [logits, edit.constant(softcap, np.float32)])[0]
    masked = edit.node(node, "Add", [logits, edit.node(node, "Cast", [mask], to=wide)[0]])[0]
    weights = edit.node(node, "Softmax", [masked], axis=-1)[0]
    narrow = edit.node(node, "Cast", [weights], to=int(element))[0]
    return edit.node(node, "MatMul", [narrow, value])[0]

"""Pieces that compressor graphs share, in ONNX text, so that they read as what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from semkv_deploy.methods.base import STATE
from semkv_deploy.ops import DOMAIN, OPSET, VERSION, function_protos

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.model.config import ModelFacts

IR_VERSION = 11

COMPRESSED = (*(f"{name}_out" for name in STATE), "level", "evicted")
"""Outputs of a compressor."""

SLOTS = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    two = Constant <value = int64 {2}> ()
    minus_one = Constant <value = int64 {-1}> ()
    axis_0 = Constant <value = int64[1] {0}> ()
    axis_1 = Constant <value = int64[1] {1}> ()
    capacity_1 = Shape <start = 2, end = 3> (key_cache)
    capacity = Squeeze (capacity_1)
    slot = Range (zero, capacity, one)
    target_column = Unsqueeze (target, axis_1)
"""
"""Constants, and `slot` `[C]`, the number of every slot."""

MOVE_METADATA = """
    moved_from = Max (final_index, zero)
    moved_none = Less (final_index, zero)
    metadata_shape = Shape (slot_position)
    moved_index = Expand (moved_from, metadata_shape)
    position_moved = GatherElements <axis = 2> (slot_position, moved_index)
    chunk_moved = GatherElements <axis = 2> (slot_chunk, moved_index)
    slot_position_out = Where (moved_none, zero, position_moved)
    slot_chunk_out = Where (moved_none, zero, chunk_moved)
"""
"""Slot metadata follows `final_index` `[B,1|G,C]`: the old slot each new slot comes from (negative: none)."""


def move_column(name: str) -> str:
    """Text that moves a further slot column `name`, after `MOVE_METADATA`."""
    return f"""
    {name}_moved = GatherElements <axis = 2> ({name}, moved_index)
    {name}_out = Where (moved_none, zero, {name}_moved)
    """


def parse_compressor(
    model: ModelFacts,
    *,
    cluster_groups: int,
    inputs: tuple[str, ...],
    operators: tuple[str, ...],
    body: str,
    outputs: tuple[str, ...] = COMPRESSED,
    more: Mapping[str, str] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """The compressor graph of one cache group from its body.

    Args:
        model: of the model; heads, head size and element type are static in the graph.
        cluster_groups: cluster groups G.
        inputs: inputs beside the state (`methods.base.STATE`).
        operators: `semkv` operators the body calls; their functions are attached.
        body: ONNX text that defines the outputs.
        outputs: `<state>_out`, `level` and `evicted`, or fewer.
        more: types of inputs that only this method has.
        functions: of the method's own, which the body calls.

    Raises:
        onnx.checker.ValidationError: when the body is not a valid graph.
    """
    import onnx
    import onnx.parser

    element = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[model.dtype]
    heads, head_dim = model.kv_heads, model.head_dim
    types = {
        "key_cache": f"{element}[batch,{heads},capacity,{head_dim}]",
        "value_cache": f"{element}[batch,{heads},capacity,{head_dim}]",
        "slot_bias": f"float[batch,{heads},capacity]",
        "length": "int64[batch]",
        "slot_position": f"int64[batch,{cluster_groups},capacity]",
        "slot_chunk": f"int64[batch,{cluster_groups},capacity]",
        "thresholds": "float[levels]",
        "target": "int64[batch]",
        "sinks": "int64",
        "recent": "int64[batch]",
        "level": "int64[batch]",
        "evicted": "int64[batch]",
        **(more or {}),
    }
    declared = ", ".join(f"{types[name]} {name}" for name in STATE + inputs)
    returned = ", ".join(f"{types[name.removesuffix('_out')]} {name}" for name in outputs)
    own = "".join(f', "{domain}": 1' for domain in sorted({function.domain for function in functions}))
    graph = onnx.parser.parse_model(
        f"""
        <ir_version: {IR_VERSION}, opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}{own}]>
        compressor ({declared}) => ({returned}) {{ {body} }}
        """
    )
    graph.functions.extend(proto for proto in function_protos() if proto.name in operators)
    graph.functions.extend(functions)
    onnx.checker.check_model(graph)
    return graph

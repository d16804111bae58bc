"""The program that writes the representatives of blocks that are closed, for one cache group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from semkv_deploy.methods.representatives import Kind, map_text, table_size
from semkv_deploy.ops import DOMAIN, OPSET, VERSION, semantic_block_map

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.model.config import ModelFacts


_SHARED = """
            keys = Identity (key_cache)
            starts = Identity (block_start)
            lengths = Identity (block_length)
            {text}
            number_axes = Constant <value = int64[3] {{1, 3, 4}}> ()
            new = Identity (updates)
"""

_BY_HEAD = """
            key_shape = Constant <value = int64[4] {{-1, 1, 0, 0}}> ()
            keys = Reshape (key_cache, key_shape)
            closed = Shape <start = 2> (block_start)
            any = Constant <value = int64[1] {{-1}}> ()
            rows = Concat <axis = 0> (any, closed)
            starts = Reshape (block_start, rows)
            lengths = Reshape (block_length, rows)
            {text}
            number_axes = Constant <value = int64[2] {{3, 4}}> ()
            new_shape = Constant <value = int64[5] {{-1, {heads}, 0, 0, 0}}> ()
            new = Reshape (updates, new_shape)
"""


def map_program(model: ModelFacts, *, longest: int, kind: Kind, by_head: bool = False) -> onnx.ModelProto:
    """The program that writes the representatives of blocks that are closed, for a group of `model.kv_heads` heads.

    Inputs: `key_cache` `[B,H,C,D]` T, `representatives` `[B,H,N,R,E]` T, `block_start`, `block_length` and
    `block_number` `[B,M]` int64 (`[B,H,M]` with `by_head`): length 0 with number N-1, which no block ever has, for
    none. Output: `representatives_out`.
    """
    import onnx
    import onnx.parser

    element = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[model.dtype]
    heads, (vectors, size) = model.kv_heads, table_size(kind, model.head_dim)
    table = f"{element}[batch,{heads},blocks,{vectors},{size}]"
    named = f"int64[batch,{heads},closed]" if by_head else "int64[batch,closed]"
    body = (_BY_HEAD if by_head else _SHARED).format(text=map_text(kind, longest), heads=heads)
    graph = onnx.parser.parse_model(
        f"""
        <ir_version: 11, opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}]>
        map_blocks ({element}[batch,{heads},capacity,{model.head_dim}] key_cache, {table} representatives,
            {named} block_start, {named} block_length, {named} block_number)
            => ({table} representatives_out)
        {{
            {body}
            number = Unsqueeze (block_number, number_axes)
            shape = Shape (new)
            place = Expand (number, shape)
            representatives_out = ScatterElements <axis = 2> (representatives, place, new)
        }}
        """
    )
    graph.functions.append(semantic_block_map.function_proto())
    onnx.checker.check_model(graph)
    return graph

"""What stands for a closed block's keys when blocks are scored, whatever the block's length.

| kind | vectors | a query's score of a block | |
|---|---|---|---|
| min_max | 2 of D | sum over channels of max(q s, q l), smallest s and largest l | Quest's bound of every q.k in it |
| mean_radius | 1 of D + 8 | q.m + sum over 8 parts of channels of \\|q\\| r | a bound too, of half the bytes |
| mean | 1 of D | q.m | no bound |

r is the largest distance of a key of the block from its mean m in a part of D / 8 channels: by Cauchy and Schwarz
q.(k - m) is at most the sum of \\|q\\| r over parts (Ball trees have one part; ours has 8, which is tighter and keeps
vectors aligned). As one vector [m, r] against the query [q, \\|q\\|] it is a dot product, so that `SemanticBlockSelect`
scores it as a mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import DOMAIN, semantic_block_map

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from semkv_deploy.graph.editing import GraphEditor

Kind = Literal["min_max", "mean_radius", "mean"]

BLOCK_END = "block_end"
REPRESENTATIVES = "representatives"
MAP_BLOCKS = "map_blocks"
"""Names of the decoder's input, of the buffer, and of the program that writes it."""

BLOCKS, CLOSED = "blocks", "closed"
"""Symbols of sizes: rows of a table of blocks, and blocks that a run of the program maps."""

PARTS = 8
"""Parts of the channels that have a radius each."""

SLACK = 1 + 2.0**-7
"""What radii are multiplied by: more than a radius and a size of a query lose when they are rounded to bfloat16."""


def table_size(kind: Kind, head_dim: int) -> tuple[int, int]:
    """R and E: vectors of a block, and elements of each."""
    return {"min_max": (2, head_dim), "mean_radius": (1, head_dim + PARTS), "mean": (1, head_dim)}[kind]


def scoring_query(edit: GraphEditor, query: ir.Value, kind: Kind) -> ir.Value:
    """`[B,Hq,S,E]` at the end of the graph: what a block's vectors are multiplied with, of a query `[B,Hq,S,D]`."""
    import numpy as np
    import onnx_ir as ir

    from semkv_deploy.graph.editing import static

    if kind != "mean_radius":
        return query
    (parts,) = edit.node(None, "Reshape", [query, edit.constant([0, 0, 0, PARTS, -1], np.int64)])
    (sizes,) = edit.node(None, "ReduceL2", [parts, edit.constant([-1], np.int64)], keepdims=0)
    (result,) = edit.node(None, "Concat", [query, sizes], axis=-1)
    assert query.shape is not None
    result.shape, result.type = ir.Shape([*query.shape[:3], static(query, 3) + PARTS]), query.type
    return result


def map_text(kind: Kind, longest: int) -> str:
    """ONNX text: `updates` `[B,H,M,R,E]`, vectors of the blocks that `starts` and `lengths` `[B,M]` name in `keys`."""
    vectors = table_size(kind, 1)[0]
    block_map = f"{DOMAIN}.SemanticBlockMap <vectors: int = {vectors}, max_block_length: int = {longest}>"
    if kind != "mean_radius":
        return f"updates, slots = {block_map} (keys, starts, lengths)"
    return f"""
        mean, slots = {block_map} (keys, starts, lengths)
        nothing = Constant <value = int64 {{0}}> ()
        heads_axis = Constant <value = int64[1] {{1}}> ()
        last_axis = Constant <value = int64[1] {{-1}}> ()
        outer_axes = Constant <value = int64[2] {{1, 4}}> ()
        slots_axis = Constant <value = int64[1] {{3}}> ()
        heads = Shape <start = 1, end = 2> (keys)
        row_shape = Shape <start = 0, end = 1> (slots)
        table_shape = Shape <start = 1, end = 3> (slots)
        index_shape = Concat <axis = 0> (row_shape, heads, table_shape)
        read = Max (slots, nothing)
        read_by_head = Unsqueeze (read, heads_axis)
        index = Expand (read_by_head, index_shape)
        index_column = Unsqueeze (index, last_axis)
        key_rows = GatherND <batch_dims = 2> (keys, index_column)
        keys_f = Cast <to = 1> (key_rows)
        mean_f = Cast <to = 1> (mean)
        away = Sub (keys_f, mean_f)
        parts_shape = Constant <value = int64[6] {{0, 0, 0, 0, {PARTS}, -1}}> ()
        parts = Reshape (away, parts_shape)
        squares = Mul (parts, parts)
        square = ReduceSum <keepdims = 0> (squares, last_axis)
        is_slot_row = GreaterOrEqual (slots, nothing)
        is_slot = Unsqueeze (is_slot_row, outer_axes)
        none = Constant <value = float {{0.0}}> ()
        square_inside = Where (is_slot, square, none)
        largest = ReduceMax <keepdims = 1> (square_inside, slots_axis)
        distance = Sqrt (largest)
        slack = Constant <value = float {{{SLACK}}}> ()
        radius_f = Mul (distance, slack)
        radius = CastLike (radius_f, mean)
        updates = Concat <axis = -1> (mean, radius)
    """


def reference(kind: Kind, key_cache: Tensor, start: Tensor, length: Tensor, longest: int) -> Tensor:
    """`[B,H,M,R,E]`, one block at a time."""
    import torch

    vectors, elements = table_size(kind, key_cache.shape[-1])
    mapped, slots = semantic_block_map.reference(key_cache, start, length, vectors, longest)
    if kind != "mean_radius":
        return mapped
    batch, heads, blocks = mapped.shape[:3]
    result = key_cache.new_zeros(batch, heads, blocks, 1, elements)
    for b in range(batch):
        for n in range(blocks):
            held = slots[b, n][slots[b, n] >= 0]
            for h in range(heads if len(held) else 0):
                mean = mapped[b, h, n, 0]
                away = (key_cache[b, h, held].float() - mean.float()).reshape(len(held), PARTS, -1)
                radius = away.square().sum(-1).amax(0).sqrt() * SLACK
                result[b, h, n, 0] = torch.cat([mean, radius.to(mean.dtype)])
    return result


def bound(kind: Kind, query: Tensor, table: Tensor) -> Tensor:
    """`[N]` scores in float32 of blocks with vectors `[N,R,E]`, for one query `[D]`: what the graph computes."""
    import torch

    from semkv_deploy.ops.semantic_block_select import block_scores

    rows = query.float()
    if kind == "mean_radius":
        rows = torch.cat([rows, rows.reshape(PARTS, -1).square().sum(-1).sqrt()])
    return block_scores(rows[None], table.float())


def map_reference(kind: Kind, longest: int, state: dict[str, Any], **blocks: Tensor) -> dict[str, Any]:
    """The program "map_blocks": what is written of each block, at its number; of equal numbers the last counts.

    Args:
        blocks: `block_start`, `block_length` and `block_number`, `[B,M]`, or `[B,H,M]` where heads have their own.
    """
    table = state["representatives"].clone()
    start, length, number = (blocks[name] for name in ("block_start", "block_length", "block_number"))
    for h in range(table.shape[1]):
        starts, lengths, numbers = (each[:, h] if each.dim() == 3 else each for each in (start, length, number))
        updates = reference(kind, state["key_cache"][:, h : h + 1], starts, lengths, longest)
        for b in range(len(numbers)):
            for place, n in enumerate(numbers[b].tolist()):
                table[b, h, n] = updates[b, 0, place]
    return {**state, "representatives": table}


def require_uniform(capacities: set[int]) -> None:
    """Fails for groups of several capacities: a row's blocks are the same in all of them.

    Raises:
        SemkvError: naming the option.
    """
    if len(capacities) > 1:
        raise SemkvError(
            "blocks are chosen in a whole cache, which every layer and head has alike",
            where="--cache-groups, --budget-by",
            expected="groups of one capacity",
            got=sorted(capacities),
            fix="leave the option out",
        )

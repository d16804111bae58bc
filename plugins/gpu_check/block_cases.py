"""Random cases of SemanticBlockMap and SemanticBlockSelect: one generator for the emulated kernels and for the GPU."""

from __future__ import annotations

import random
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (8, 64, 80, 96, 128, 256)


def map_case(seed: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """key_cache, block_start, block_length and attributes: ragged, empty, longest blocks; in any order, overlapping."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, blocks = draw.randint(1, 9), draw.randint(1, 3), draw.choice((1, 7, 8, 20))
    longest = draw.choice((1, 5, 33, 40))
    capacity = draw.choice((longest, 64, 100, 200)) if longest <= 64 else longest
    key_cache = torch.randn(batch, heads, capacity, HEAD_SIZES[seed // 6 % 6]).to(DTYPES[seed % 3])
    start, length = torch.zeros(batch, blocks, dtype=torch.int64), torch.zeros(batch, blocks, dtype=torch.int64)
    for b in range(batch):
        kind = draw.choice(("ragged", "longest", "anywhere", "none"))
        at = 0
        for n in range(blocks):
            size = {"longest": longest, "none": 0}.get(kind, draw.randint(0, longest))
            if kind == "anywhere":
                at = draw.randint(0, capacity - size)
            size = min(size, capacity - at)
            # Where an empty block starts must not matter.
            start[b, n] = at if size else draw.choice((-5, 0, capacity, 2**40))
            length[b, n] = size
            at += size
    return (key_cache, start, length), {"vectors": 1 + seed // 3 % 2, "max_block_length": longest}


def select_case(seed: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The operator's five inputs and attributes. Scores are sums of small integers, exact in every order of summation,
    so that equal scores are common and no decision hangs on a rounding error."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    vectors, reduce_max = 1 + seed // 3 % 2, seed // 6 % 2
    batch, kv_heads, group = draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 8)
    rows, head_size = draw.choice((1, 1, 3)), HEAD_SIZES[seed // 12 % 6]
    blocks = draw.choice((1, 6, 31, 33, 70)) if seed % 8 else 1100
    longest = draw.choice((1, 5, 33, 40)) if seed % 8 else 5
    query = torch.randint(-2, 3, (batch, kv_heads * group, rows, head_size)).to(dtype)
    shape = (batch, kv_heads, blocks, vectors, head_size)
    # Few different blocks, one common sign, or all alike: many ties, whole digits of the keys shared.
    representatives = torch.randint(-3, 4, shape) if draw.random() < 0.6 else torch.ones(shape, dtype=torch.int64)
    representatives = (representatives + draw.choice((0, 0, 100))).sort(3).values.to(dtype)
    length = torch.randint(0, longest + 1, (batch, blocks))
    length[:, :: draw.choice((1, 2, 7))] = draw.choice((0, longest))
    step = torch.arange(longest)
    slots = (length.cumsum(-1) - length)[..., None] + step
    block_slots = torch.where(step < length[..., None], slots, -1)
    count = torch.tensor([draw.choice((0, blocks, draw.randint(0, blocks))) for _ in range(batch)])
    pinned = torch.where(torch.rand(batch, blocks) < draw.choice((0.0, 0.1, 1.0)), draw.choice((1, -1, 2**40)), 0)
    total = max(int(length.sum(-1).max()), 1)
    width = draw.choice((1, longest, total // 5 + 1, total // 2 + 1, total, total + 100))
    inputs = (query, representatives, block_slots, count, pinned)
    return inputs, {"width": width, "reduce_max": reduce_max}

"""Random cases of NexusAttention: one generator for the emulated kernels and for the GPU."""

from __future__ import annotations

import random
from typing import Any

import torch

HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative to the largest magnitude of the reference output; the caches must be equal bit for bit."""


def case(seed: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Inputs and attributes. The first seeds walk every (head size, dtype, GQA group); the rest is drawn."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    group = seed % 8 + 1
    head_size = HEAD_SIZES[seed // 8 % 5]
    dtype = DTYPES[seed // 40 % 3]
    batch = draw.randint(1, 9) if head_size < 128 and group < 5 else draw.randint(1, 2)
    kv_heads = draw.randint(1, 2)
    rows = draw.choice((1, 1, 1, 1, 2, 3, 5))
    capacity = draw.choice((rows, rows + 1, 64, 100, 129, 192))
    lengths = [draw.choice((0, capacity - rows, draw.randint(0, capacity - rows))) for _ in range(batch)]
    shape = (batch, kv_heads, capacity, head_size)
    query = torch.randn(batch, group * kv_heads, rows, head_size) * 2
    key, value = torch.randn(2, batch, kv_heads, rows, head_size)
    key_cache, value_cache = torch.randn(2, *shape)
    slot_bias = torch.log(torch.randint(1, 9, shape[:3]).float())
    slot_bias[torch.rand(shape[:3]) < draw.choice((0.0, 0.2, 1.0))] = -torch.inf
    for b, length in enumerate(lengths):
        dead = slice(length + rows, None)
        key_cache[b, :, dead] = 3e4
        value_cache[b, :, dead] = -3e4
        slot_bias[b, :, length:] = draw.choice((0.0, torch.inf, torch.nan, 50.0))
    attributes = {
        "scale": draw.choice((0.0, 0.0, 0.1)),
        "causal": draw.choice((1, 1, 1, 0)),
        "softcap": draw.choice((0.0, 0.0, 5.0)),
        "window": draw.choice((0, 0, 1, 37)),
    }
    tensors = [t.to(dtype).contiguous() for t in (query, key, value, key_cache, value_cache)]
    return (*tensors, slot_bias, torch.tensor(lengths)), attributes


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest magnitude; NaN anywhere gives infinity."""
    difference = (got.double() - want.double()).abs().max().item()
    scale = want.double().abs().max().item()
    return float("inf") if difference != difference else difference / max(scale, 1e-30)

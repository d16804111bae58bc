"""Random cases of CompactCache and SemanticCluster: one generator for the emulated kernels and for the GPU."""

from __future__ import annotations

import random

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _caches(draw: random.Random, batch: int, heads: int, capacity: int, seed: int) -> list[torch.Tensor]:
    dtype = DTYPES[seed % 3]
    # Seeds walk every (type, head size); a long cache has the smallest ones only.
    head_size = (64, 80, 96, 128, 256)[seed // 3 % 5] if capacity < 400 else draw.choice((64, 80))
    shape = (batch, heads, capacity, head_size)
    return [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]


def compact_case(seed: int) -> tuple[torch.Tensor, ...]:
    """key_cache, value_cache, slot_bias, keep_index: ascending with holes, shuffled, repeated, empty and full rows."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads = draw.randint(1, 9) if seed % 8 else 2, draw.randint(1, 4)
    capacity = draw.choice((1, 64, 100)) if seed % 8 else 1100
    groups = draw.choice((1, heads))
    key_cache, value_cache = _caches(draw, batch, heads, capacity, seed)
    slot_bias = torch.log(torch.randint(1, 9, (batch, heads, capacity)).float())
    keep_index = torch.full((batch, groups, capacity), -1)
    for b in range(batch):
        for g in range(groups):
            kept = sorted(draw.sample(range(capacity), draw.choice((0, capacity, draw.randint(0, capacity)))))
            order = draw.choice(("ascending", "shuffled", "repeated"))
            if order == "shuffled":
                draw.shuffle(kept)
            if order == "repeated" and kept:
                kept = sorted(draw.choices(kept[: len(kept) // 3 + 1], k=len(kept)))
            places = sorted(draw.sample(range(capacity), len(kept)))
            keep_index[b, g, places] = torch.tensor(kept, dtype=torch.int64)
    return key_cache, value_cache, slot_bias, keep_index


def cluster_case(seed: int) -> tuple[tuple[torch.Tensor, ...], int]:
    """The operator's seven inputs and span. Keys are drawn around a few directions, so that clusters form; similarities
    stay away from the thresholds, where a rounding error could change a decision."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads = draw.randint(1, 2), draw.randint(1, 3)
    span = draw.choice((1, 16, 64, 64))
    capacity = draw.choice((64, 128, 192)) if seed % 4 else 256
    groups, levels = draw.choice((1, heads)), draw.randint(1, 4)
    key_cache, value_cache = _caches(draw, batch, heads, capacity, seed)
    head_size = key_cache.shape[-1]
    directions = torch.nn.functional.normalize(torch.randn(3, head_size), dim=-1)
    kind = torch.randint(0, 3, (batch, 1 if groups == 1 else heads, capacity))
    noise = 0.02 * torch.randn(batch, heads, capacity, head_size)
    keys = (directions[kind.expand(batch, heads, capacity)] + noise) * (1 + 3 * torch.rand(batch, heads, capacity, 1))
    key_cache = keys.to(key_cache.dtype)
    chunk = torch.cumsum((torch.rand(batch, groups, levels, capacity) < draw.choice((0.01, 0.05, 0.3))).long(), dim=-1)
    chunk[torch.rand(chunk.shape) < 0.05] = -1
    # Same direction: cosine about 0.97; different ones: about 0.
    thresholds = torch.tensor(sorted(draw.choice((0.6, 0.4, 1.5)) for _ in range(levels)))
    bias = torch.log(torch.randint(1, 5, (batch, heads, capacity)).float())
    bias[torch.rand(bias.shape) < draw.choice((0.0, 0.1))] = -torch.inf
    if groups == 1:
        bias = bias[:, :1].expand_as(bias).contiguous()
    length = torch.tensor([draw.choice((0, capacity, capacity, draw.randint(0, capacity))) for _ in range(batch)])
    target = torch.tensor([draw.choice((int(n), int(n) // 2, int(n) // 3, int(n) * 4 // 5, 0)) for n in length])
    return (key_cache, value_cache, bias, length, chunk, thresholds, target), span

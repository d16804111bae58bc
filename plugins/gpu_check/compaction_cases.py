"""Random cases of CompactCache and SemanticCluster: one generator for the emulated kernels and for the GPU."""

from __future__ import annotations

import random

import torch

from semkv_deploy.ops import semantic_cluster

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
    """The operator's seven inputs and span. Keys are drawn around a few directions, so that clusters form, some of them
    equal; similarities stay away from the thresholds, where a rounding error could change a decision, but for 1, which
    rounding lifts equal keys above and which none may exceed.

    Every eighth case is one chunk of 512 slots, in which each 64 slots depend on those before; of the others every
    fourth has a target that its first level just meets.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    long, tight = seed % 8 == 4, seed % 4 == 3
    batch, heads = (1, draw.randint(1, 2)) if long else (draw.randint(1, 2), draw.randint(1, 3))
    span = 64 if long else draw.choice((1, 16, 64, 64))
    capacity = 512 if long else draw.choice((64, 128, 192)) if seed % 4 else 256
    groups, levels = draw.choice((1, heads)), 1 if long else draw.randint(2 if tight else 1, 4)
    key_cache, value_cache = _caches(draw, batch, heads, capacity, seed)
    head_size = key_cache.shape[-1]
    directions = torch.nn.functional.normalize(torch.randn(3, head_size), dim=-1)
    kind = torch.randint(0, 3, (batch, 1 if groups == 1 else heads, capacity))
    noise = draw.choice((0.0, 0.02)) * torch.randn(batch, heads, capacity, head_size)
    sizes = 1 + 3 * torch.rand(batch, heads, capacity, 1)
    keys = (directions[kind.expand(batch, heads, capacity)] + noise) * (1 if draw.random() < 0.3 else sizes)
    key_cache = keys.to(key_cache.dtype)
    ends = torch.rand(batch, groups, levels, capacity) < draw.choice((0.01, 0.05, 0.3))
    chunk = torch.cumsum(ends.long(), dim=-1) * (0 if long else 1)
    chunk[torch.rand(chunk.shape) < 0.05] = -1
    # Same direction: cosine about 0.97; different ones: about 0.
    thresholds = torch.tensor(sorted(0.6 if long else draw.choice((0.6, 0.4, 1.0, 1.5)) for _ in range(levels)))
    bias = torch.log(torch.randint(1, 5, (batch, heads, capacity)).float())
    bias[torch.rand(bias.shape) < draw.choice((0.0, 0.1))] = -torch.inf
    if groups == 1:
        bias = bias[:, :1].expand_as(bias).contiguous()
    length = torch.tensor([draw.choice((0, capacity, capacity, draw.randint(0, capacity))) for _ in range(batch)])
    targets = [draw.choice((int(n), int(n) // 2, int(n) // 3, int(n) * 4 // 5, 0, -1)) for n in length]
    if long:
        length, targets = torch.tensor([capacity - seed % 16]), [0]
    inputs = (key_cache, value_cache, bias, length, chunk, thresholds, torch.tensor(targets))
    if tight:
        first = (*inputs[:4], chunk[:, :, :1].contiguous(), thresholds[:1], torch.zeros_like(length))
        inputs = (*inputs[:6], semantic_cluster.reference(*first, span=span)[3])
    return inputs, span

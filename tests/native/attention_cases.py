"""Inputs of NexusAttention by seed-like parameters, with garbage in every dead slot."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from semkv_deploy.ops import nexus_attention


class Case(NamedTuple):
    """Sizes and types of a call.

    Attributes:
        cache: type of the caches; int8 brings scales.
        width: entries of slot_index; 0: the node has none.
    """

    lengths: tuple[int, ...]
    rows: int = 1
    heads: int = 6
    kv_heads: int = 2
    size: int = 64
    capacity: int = 96
    dtype: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32
    width: int = 0
    dead: bool = True

    @property
    def options(self) -> tuple[str, ...]:
        return ("indexed",) * (self.width > 0) + ("int8",) * (self.cache == torch.int8)


def inputs_of(case: Case, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, kv_heads, capacity, size = len(case.lengths), case.kv_heads, case.capacity, case.size
    new = [random(batch, h, case.rows, size).to(case.dtype) for h in (case.heads, kv_heads, kv_heads)]
    caches = [random(batch, kv_heads, capacity, size) for _ in range(2)]
    bias = random(batch, kv_heads, capacity)
    scales = []
    if case.cache == torch.int8:
        caches, scales = (list(t) for t in zip(*(nexus_attention.quantize(c, "int8") for c in caches), strict=True))
    caches = [c.to(case.cache) for c in caches]
    for b, used in enumerate(case.lengths):
        for cache in caches:
            cache[b, :, used:] = 101 if case.cache == torch.int8 else 6e4
        bias[b, :, used:] = 50.0
        if case.dead and used > 3:
            bias[b, :, 1] = -math.inf
            for cache in caches:
                cache[b, :, 1] = 111 if case.cache == torch.int8 else -6e4
    index = []
    if case.width:
        entries = torch.full((batch, kv_heads, case.width), -1)
        for b, used in enumerate(case.lengths):
            for h in range(kv_heads):
                named = torch.randperm(used, generator=generator)[: case.width - 2]
                entries[b, h, 1 : 1 + len(named)] = named
                if used > 5 and case.width > used // 2:
                    entries[b, h, -1] = 3
        index = [entries]
    return [*new, *caches, bias, torch.tensor(case.lengths), *index, *scales]


def expected(case: Case, inputs: list[Tensor], **attributes: float) -> list[Tensor]:
    """What the reference gives in float32 of what a cache of this type holds, its caches in that type again."""
    named = list(inputs[7:])
    index = named.pop(0) if case.width else None
    quantized = case.cache == torch.int8
    given = [t.float() for t in inputs[:3]]
    caches = inputs[3:5]
    if not quantized:
        given[1:] = [t.to(case.cache).float() for t in given[1:]]
        caches = [t.float() for t in caches]
    scales = dict(zip(("key_scale", "value_scale"), named, strict=True)) if quantized else {}
    output, keys, values, *rest = nexus_attention.reference(
        *given, *caches, inputs[5], inputs[6], slot_index=index, mass=True, **scales, **attributes
    )
    return [output.to(case.dtype), keys.to(case.cache), values.to(case.cache), *rest]

"""Random cases of NexusAttention: one generator for the emulated kernels and for the GPU."""

from __future__ import annotations

import random
from typing import Any

import torch

from semkv_deploy.ops import nexus_attention

HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative to the largest magnitude of the reference output; the caches must be equal bit for bit."""
MASS_TOLERANCE = 3e-5
"""The mass is float32 for every type of the inputs."""


def case(seed: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Inputs and attributes. The first seeds walk every (head size, dtype, GQA group); the rest is drawn."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    group = seed % 8 + 1
    head_size = HEAD_SIZES[seed // 8 % 5]
    dtype = DTYPES[seed // 40 % 3]
    batch = draw.randint(1, 9) if head_size < 128 and group < 5 else draw.randint(1, 2)
    kv_heads = draw.randint(1, 2)
    rows = draw.choice((1, 1, 1, 1, 2, 3, 5, 9))
    capacity = draw.choice((rows, rows + 1, 64, 100, 129, 192))
    if seed % 9 == 0:  # many tiles of slots, in every split and element type
        batch, capacity = 1, draw.choice((513, 1000, 2049, 4096))
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


OPTIONS = [spec.overload.split("_") for spec in nexus_attention.OP.variants() if spec.overload]
"""Every set of options, in turn: eleven, which has no divisor with what `case` walks through."""


def option_case(seed: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor], dict[str, Any]]:
    """`case`, with options: its inputs, the optional ones by name, and its attributes with mass=True where asked for.

    Named slots are in random order, some of them twice, with holes; scales of dead slots are huge.
    """
    inputs, attributes = case(seed)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    query, key, value, *caches, slot_bias, length = inputs
    chosen = OPTIONS[seed % len(OPTIONS)]
    options: dict[str, torch.Tensor] = {}
    if "indexed" in chosen:
        capacity = slot_bias.shape[2]
        index = torch.full((*slot_bias.shape[:2], draw.choice((1, 7, 64, 70, capacity))), -1)
        for b, live in enumerate(length.tolist()):
            for h in range(slot_bias.shape[1]):
                named = draw.sample(range(live), draw.randint(0, live))
                named += draw.choices(named, k=draw.choice((0, 0, 3))) if named else []
                named = named[: index.shape[2]]
                index[b, h, sorted(draw.sample(range(index.shape[2]), len(named)))] = torch.tensor(
                    named, dtype=torch.int64
                )
        options["slot_index"] = index
    for option in {"int8", "fp8"} & set(chosen):
        for i, name in enumerate(("key_scale", "value_scale")):
            caches[i], options[name] = nexus_attention.quantize(torch.randn(caches[i].shape), option)
            for b, live in enumerate(length.tolist()):
                caches[i].view(torch.uint8)[b, :, live + query.shape[2] :] = 0x7E
                options[name][b, :, live + query.shape[2] :] = 1e30
    return (query, key, value, *caches, slot_bias, length), options, attributes | {"mass": "mass" in chosen}


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """As float64, unless it is an integer or a code."""
    return tensor.double() if tensor.dtype in DTYPES else tensor


def option_reference(
    inputs: tuple[torch.Tensor, ...], options: dict[str, torch.Tensor], attributes: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """What `option_case` must give, computed in float64."""
    exact_inputs = (t if i == 5 else exact(t) for i, t in enumerate(inputs))
    return nexus_attention.reference(*exact_inputs, **options, **attributes)


def differences(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], mass: bool) -> list[str]:
    """What is wrong with a result: output and mass beyond their tolerance, caches and scales not equal bit for bit."""
    wrong = []
    middle = slice(1, -1 if mass else None)
    if (error := relative_error(got[0], want[0])) > TOLERANCE[got[0].dtype]:
        wrong.append(f"output {error:.2e}")
    for i, (a, b) in enumerate(zip(got[middle], want[middle], strict=True)):
        if not torch.equal(exact(a).view(torch.uint8), exact(b).view(torch.uint8)):
            wrong.append(f"cache {i}")
    if mass and (error := relative_error(got[-1], want[-1])) > MASS_TOLERANCE:
        wrong.append(f"mass {error:.2e}")
    return wrong


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest magnitude; NaN anywhere gives infinity."""
    difference = (got.double() - want.double()).abs().max().item()
    scale = want.double().abs().max().item()
    return float("inf") if difference != difference else difference / max(scale, 1e-30)

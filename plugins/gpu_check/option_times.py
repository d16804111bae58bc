"""NexusAttention's options on a GPU: correctness over random cases, and what each costs beside plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bindings
import nexus_cases
import timing
import torch

from semkv_deploy.ops import nexus_attention

VARIANTS = ("plain", "mass", "int8", "fp8", "indexed 0.2", "indexed 0.2 int8")
KEPT = 0.2
"""Share of the live slots that the indexed variants name."""


def option_failures(kernels: bindings.Kernels, device: torch.device, cases: int) -> list[str]:
    """Every set of options against the reference on the CPU; outputs start poisoned."""
    failures = []
    for seed in range(cases):
        inputs, options, attributes = nexus_cases.option_case(seed)
        want = nexus_cases.option_reference(inputs, options, attributes)
        got = bindings.nexus_attention(
            kernels,
            tuple(t.to(device) for t in inputs),
            {name: t.to(device) for name, t in options.items()},
            **attributes,
        )
        if wrong := nexus_cases.differences(tuple(t.cpu() for t in got), want, attributes["mass"]):
            failures.append(f"NexusAttention with {sorted(options)} seed {seed}: {', '.join(wrong)}")
    return failures


def option_times(kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float) -> dict[str, Any]:
    """One decode step, batch 8, 32/8 heads of 128, float16 queries: ms and share of the copy bandwidth of each variant.

    Bytes: rows that are read, their biases and scales, slot_index; for the mass the products written and read back.
    """
    batch, query_heads, kv_heads, head_size = (1, 4, 2, 64) if device.type == "cpu" else (8, 32, 8, 128)
    query = torch.randn(batch, query_heads, 1, head_size, device=device).half()
    fresh = torch.randn(2, batch, kv_heads, 1, head_size, device=device).half()
    bias = torch.zeros(batch, kv_heads, slots, device=device)
    length = torch.full((batch,), slots - 1, dtype=torch.int64, device=device)
    width = int(slots * KEPT)
    index = torch.rand(batch, kv_heads, slots - 1, device=device).argsort(-1)[..., :width].sort(-1)[0].contiguous()
    heads = batch * kv_heads
    result: dict[str, Any] = {"slots": slots, "width": width}
    for variant in VARIANTS:
        code = next((option for option in ("int8", "fp8") if option in variant), "")
        read = width + 1 if "indexed" in variant else slots
        row_bytes = head_size + 4 if code else 2 * head_size
        copies = timing.copies_needed(2 * heads * read * row_bytes, device)
        calls: list[Callable[[], object]] = []
        keep = []
        for _ in range(copies):
            caches: Any = torch.randn(2, batch, kv_heads, slots, head_size, device=device).half()
            given: dict[str, torch.Tensor] = {}
            if code:
                codes, scales = nexus_attention.quantize(caches, code)
                caches, given = codes, {"key_scale": scales[0], "value_scale": scales[1]}
            if "indexed" in variant:
                given["slot_index"] = index
            if variant == "mass":
                given["mass"] = torch.empty_like(bias)
            output = torch.empty_like(query)
            params = bindings.nexus_attention_params(
                query, fresh[0], fresh[1], caches[0], caches[1], bias, length, output, **given
            )
            scratch = kernels.workspace("nexus_attention", params, device)
            params.workspace = bindings.pointer(scratch)
            keep.append((caches, given, output, scratch))
            calls.append(lambda p=params: kernels.call("nexus_attention", p, device))
        ms = timing.milliseconds(calls, device)
        floor = heads * read * (2 * row_bytes + 4 + (8 if "indexed" in variant else 0))
        if variant == "mass":
            floor += 4 * heads * slots + 8 * batch * query_heads * slots
        result[f"ms {variant}"] = ms
        result[f"share {variant}"] = floor / ms / 1e6 / gb_s
        del keep, calls
    return result

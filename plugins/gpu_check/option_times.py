"""NexusAttention's options on a GPU: what each costs beside plain decoding."""

from __future__ import annotations

from typing import Any

import bindings
import large_cases
import layer_times
import timing
import torch

from semkv_deploy.ops import nexus_attention

VARIANTS = ("plain", "mass", "int8", "fp8", "indexed 0.2", "indexed 0.2 int8")
KEPT = 0.2
"""Share of the live slots that the indexed variants name."""


def option_times(
    kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float, variant: str
) -> dict[str, Any]:
    """One decode step, batch 8, 32/8 heads of 128, float16 queries: ms, bytes, floor_ms and share of one variant.

    Bytes: rows that are read, their biases and scales, slot_index; for the mass the products written and read back.
    """
    batch, query_heads, kv_heads, head_size = (1, 4, 2, 64) if device.type == "cpu" else (8, 32, 8, 128)
    torch.manual_seed(0)
    query = torch.randn(batch, query_heads, 1, head_size, device=device).half()
    fresh = torch.randn(2, batch, kv_heads, 1, head_size, device=device).half()
    bias = torch.zeros(batch, kv_heads, slots, device=device)
    length = torch.full((batch,), slots - 1, dtype=torch.int64, device=device)
    code = next((option for option in ("int8", "fp8") if option in variant), "")
    width = int(slots * KEPT)
    read = width + 1 if "indexed" in variant else slots
    heads = batch * kv_heads
    row_bytes = head_size + 4 if code else 2 * head_size
    moved = heads * read * (2 * row_bytes + 4 + (8 if "indexed" in variant else 0))
    if variant == "mass":
        moved += 4 * heads * slots + 8 * batch * query_heads * slots
    calls = []
    for _ in range(timing.copies_needed(2 * heads * read * row_bytes, device)):
        caches: Any = torch.randn(2, batch, kv_heads, slots, head_size, device=device).half()
        given: dict[str, torch.Tensor] = {}
        if code:
            caches, scales = nexus_attention.quantize(caches, code)
            given = {"key_scale": scales[0], "value_scale": scales[1]}
        if "indexed" in variant:
            named = torch.rand(batch, kv_heads, slots - 1, device=device).argsort(-1)[..., :width]
            given["slot_index"] = named.sort(-1)[0].contiguous()
        inputs = (query, fresh[0], fresh[1], caches[0], caches[1], bias, length)
        calls.append(bindings.prepare_nexus_attention(kernels, inputs, given, mass=variant == "mass"))
    result = layer_times.measured(calls, device, moved, gb_s)
    failures = []
    for row in (0, batch - 1):
        want = large_cases.attention_row(inputs, given, {"mass": variant == "mass"}, row)
        failures += large_cases.compare_row(calls[-1].outputs, want, row, slots - 1, variant == "mass")[1]
    return result | {"failures": failures}

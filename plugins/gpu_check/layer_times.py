"""The other four kernels over one layer: times, floors, outputs compared.

One layer is 8 KV heads of 128 in float16. Every call is prepared beforehand: nothing but the kernels is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bindings
import large_cases
import report
import timing
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from semkv_deploy.ops import semantic_block_select

HEADS, HEAD_SIZE = 8, 128
LAYER_SLOT = HEADS * HEAD_SIZE * 2
"""Bytes of one slot's keys (or values)."""


def measured(calls: Sequence[bindings.Prepared], device: torch.device, moved: int, gb_s: float) -> dict[str, Any]:
    """ms of one call; bytes it must move; what those take at the copy bandwidth, and the share of it achieved."""
    ms = timing.milliseconds(calls, device)
    floor = moved / gb_s / 1e6
    return {"ms": ms, "bytes": moved, "floor_ms": floor, "share": floor / ms}


def cluster_times(kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float) -> dict[str, Any]:
    """Eight levels; into outputs of their own: in place, the second run would find a clustered cache."""
    inputs = large_cases.cluster_inputs(slots, HEADS, HEAD_SIZE, 8, device)
    copies = timing.copies_needed(5 * slots * LAYER_SLOT, device)
    calls = [
        bindings.prepare_semantic_cluster(kernels, tuple(t.clone() for t in inputs), 64, False) for _ in range(copies)
    ]
    # Keys are read for the cosines and again to be merged, values once; both are written to the end.
    result = measured(calls, device, 5 * slots * LAYER_SLOT, gb_s)
    result["failures"] = large_cases.cluster_failures(inputs, calls[-1].outputs, 64)
    result["length"], result["level"] = int(calls[-1].outputs[3][0]), int(calls[-1].outputs[5][0])
    try:
        result["layer_prefill_ms"] = prefill = layer_prefill(slots, device)
        result["share_of_prefill"] = result["ms"] / prefill
    except (RuntimeError, TypeError) as error:
        result["layer_prefill_ms"], result["layer_prefill_error"] = None, report.first_line(error)
    return result


def compact_times(kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float) -> dict[str, Any]:
    """Every fifth slot kept, into outputs of their own."""
    keys, values, bias = large_cases.cluster_inputs(slots, HEADS, HEAD_SIZE, 1, device)[:3]
    kept = slots // 5
    keep = torch.full((1, 1, slots), -1, dtype=torch.int64, device=device)
    keep[..., :kept] = torch.arange(kept, device=device) * 5
    moved = 2 * (kept + slots) * LAYER_SLOT
    copies = timing.copies_needed(moved, device)
    calls = [
        bindings.prepare_compact_cache(kernels, (keys.clone(), values.clone(), bias, keep), False)
        for _ in range(copies)
    ]
    result = measured(calls, device, moved, gb_s)
    got = calls[-1].outputs
    result["failures"] = [
        name
        for name, tensor, out in (("keys", keys, got[0]), ("values", values, got[1]))
        if not torch.equal(out[:, :, :kept], tensor[:, :, : 5 * kept : 5]) or bool((out[:, :, kept:] != 0).any())
    ]
    return result | {"kept": kept}


def _blocks(slots: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and length of blocks of 32 slots, [1,N] each."""
    start = (torch.arange(max(1, slots // 32), device=device) * 32)[None]
    return start, torch.full_like(start, 32)


def map_times(kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float) -> dict[str, Any]:
    """Smallest and largest values of blocks of 32 slots over the whole layer."""
    start, lengths = _blocks(slots, device)
    blocks = start.shape[1]
    moved = blocks * 32 * LAYER_SLOT + 2 * blocks * LAYER_SLOT + 8 * blocks * 40
    torch.manual_seed(0)
    keys = torch.randn(1, HEADS, slots, HEAD_SIZE, dtype=torch.float16, device=device)
    calls = [
        bindings.prepare_semantic_block_map(kernels, (keys.clone(), start, lengths), 2, 40)
        for _ in range(timing.copies_needed(moved, device))
    ]
    result = measured(calls, device, moved, gb_s)
    grouped = keys[0, :, : blocks * 32].unflatten(1, (blocks, 32))
    want = torch.stack([grouped.amin(2), grouped.amax(2)], dim=2)
    same = torch.equal(calls[-1].outputs[0][0], want)
    return result | {"blocks": blocks, "failures": [] if same else ["representatives"]}


def select_times(kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float) -> dict[str, Any]:
    """One decode step's choice of a sixteenth of the slots, in blocks of 32, for groups of four query heads.

    Small integers: scores are exact in any order of summation, so that the choice can be compared.
    """
    start, lengths = _blocks(slots, device)
    blocks, width = start.shape[1], max(slots // 16, 40)
    torch.manual_seed(0)
    query = torch.randint(-2, 3, (1, 4 * HEADS, 1, HEAD_SIZE), device=device).half()
    vectors = torch.randint(-3, 4, (1, HEADS, blocks, 2, HEAD_SIZE), device=device).sort(3).values.half()
    step = torch.arange(40, device=device)
    table = torch.where(step < lengths[..., None], start[..., None] + step, -1)
    pinned = torch.zeros_like(start)
    pinned[:, [0, -1]] = 1
    count = torch.tensor([blocks], device=device)
    moved = 2 * blocks * LAYER_SLOT + 8 * blocks * 40 + 8 * HEADS * width
    calls = [
        bindings.prepare_semantic_block_select(
            kernels, (query, vectors.clone(), table.clone(), count, pinned), width, 0
        )
        for _ in range(timing.copies_needed(moved, device))
    ]
    result = measured(calls, device, moved, gb_s)
    (want,) = semantic_block_select.reference(
        query.double().cpu(), vectors.double().cpu(), table.cpu(), count.cpu(), pinned.cpu(), width, 0
    )
    same = torch.equal(calls[-1].outputs[0].cpu(), want)
    return result | {"blocks": blocks, "width": width, "failures": [] if same else ["chosen slots"]}


def layer_prefill(tokens: int, device: torch.device) -> float:
    """Matrix products and attention of one Llama-8B layer (hidden 4096, 32/8 heads of 128, FFN 14336), in ms; on a CPU
    of one sixteenth of its widths."""
    part = 16 if device.type == "cpu" else 1
    hidden, inner, heads = 4096 // part, 14_336 // part, 32 // part
    kv_heads = max(1, 8 // part)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16, device=device)

    x, down = random(tokens, hidden), random(inner, hidden)
    weights = [random(hidden, n) for n in (hidden + 2 * kv_heads * HEAD_SIZE, hidden, 2 * inner)]
    q = random(1, heads, tokens, HEAD_SIZE)
    k, v = random(1, kv_heads, tokens, HEAD_SIZE), random(1, kv_heads, tokens, HEAD_SIZE)

    def run() -> None:
        for w in weights:
            y = x @ w
        y[:, :inner] @ down
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return timing.milliseconds([run], device, repeats=3)


TIMES = {
    "SemanticCluster": cluster_times,
    "CompactCache": compact_times,
    "SemanticBlockMap": map_times,
    "SemanticBlockSelect": select_times,
}

"""NexusAttention's decode step beside SDPA (flash): times, shares of the copy bandwidth, and its output compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bindings
import flashinfer_times
import large_cases
import report
import timing
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

KEPT = (1.0, 0.5, 0.2)
DTYPE = torch.float16


@dataclass(frozen=True)
class Decode:
    """One decode step: (query heads, KV heads, head size), batch and live slots of the full cache."""

    heads: tuple[int, int, int]
    batch: int
    slots: int

    def facts(self) -> dict[str, Any]:
        """The row's first columns."""
        return {"heads": "{}/{}x{}".format(*self.heads), "batch": self.batch, "slots": self.slots}

    def cache_bytes(self) -> int:
        """Keys and values of the full cache."""
        return 2 * self.batch * self.heads[1] * self.slots * self.heads[2] * DTYPE.itemsize

    def floor_bytes(self, live: int) -> int:
        """What a step over `live` slots must read: their keys, values and biases."""
        return self.batch * self.heads[1] * live * (2 * self.heads[2] * DTYPE.itemsize + 4)


MAIN_HEADS = ((32, 8, 128), (9, 3, 64))
MORE_HEADS = ((28, 4, 128), (64, 8, 128))
# What the targets are about comes first, so that a run that is cut off has it.
CASES = [
    *(Decode(heads, batch, slots) for heads in MAIN_HEADS for batch in (8, 64) for slots in (8192, 32_768)),
    *(Decode(heads, batch, slots) for heads in MORE_HEADS for batch in (8,) for slots in (8192, 32_768)),
    *(Decode(heads, 1, slots) for heads in MAIN_HEADS for slots in (1024, 8192, 32_768, 131_072)),
    *(Decode(heads, batch, slots) for heads in MAIN_HEADS for batch in (8, 64) for slots in (1024, 131_072)),
    *(Decode(heads, batch, slots) for heads in MORE_HEADS for batch in (1, 64) for slots in (8192, 32_768)),
    *(Decode(heads, batch, slots) for heads in MORE_HEADS for batch in (1, 8, 64) for slots in (1024, 131_072)),
]
SMALL_CASES = [Decode((4, 2, 64), 2, 64), Decode((9, 3, 64), 1, 64)]


def cache_copies(case: Decode, device: torch.device) -> list[torch.Tensor]:
    """Caches [2,B,Hkv,slots,D] to rotate through: enough for 20 % of each to leave the L2 cache, if there is room.

    Raises NotMeasured where not one fits, or too few of the full ones to leave the L2 cache.
    """
    size = case.cache_bytes()
    wanted = timing.copies_needed(size // 5, device)
    free = timing.free_bytes(device)
    copies = min(wanted, int(free * 0.85 - (1 << 28)) // size)
    if copies < min(wanted, timing.copies_needed(size, device)):
        raise report.NotMeasured(f"needs {timing.copies_needed(size, device) * size >> 20} MiB, free are {free >> 20}")
    _, kv_heads, head_size = case.heads
    shape = (2, case.batch, kv_heads, case.slots, head_size)
    return [torch.randn(shape, dtype=DTYPE, device=device) for _ in range(copies)]


def rows_to_compare(batch: int) -> Sequence[int]:
    """All rows of a small batch, four of a large one, the last, farthest in memory, among them."""
    return range(batch) if batch <= 8 else (0, batch // 3, batch * 2 // 3, batch - 1)


def output_failures(
    inputs: tuple[torch.Tensor, ...], prepared: bindings.Prepared, kept: float
) -> tuple[float, list[str]]:
    """Largest error of the compared rows against float32, and what is wrong."""
    worst, failures = 0.0, []
    if not bool(prepared.outputs[0].isfinite().all()):
        failures.append(f"output at {kept:g} is not finite")
    for row in rows_to_compare(inputs[0].shape[0]):
        want = large_cases.attention_row(inputs, {}, {"mass": False}, row)
        error, wrong = large_cases.compare_row(prepared.outputs, want, row, int(inputs[6][row]), False)
        worst = max(worst, error)
        failures += [f"at {kept:g} {w}" for w in wrong]
    return worst, failures


def flash_ms(query: torch.Tensor, caches: Sequence[torch.Tensor]) -> dict[str, Any]:
    """SDPA's flash kernel over whole caches, as {"ms_flash": ...}; None and the reason where it does not run."""
    grouped = query.shape[1] != caches[0].shape[2]

    def flash(cache: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=grouped)

    try:
        return {"ms_flash": timing.milliseconds([lambda c=c: flash(c) for c in caches], query.device)}
    except (RuntimeError, TypeError) as error:
        return {"ms_flash": None, "flash_error": report.first_line(error)}


def query_for(case: Decode, device: torch.device) -> torch.Tensor:
    """[B,Hq,1,D]."""
    return torch.randn(case.batch, case.heads[0], 1, case.heads[2], dtype=DTYPE, device=device)


def decode(kernels: bindings.Kernels, device: torch.device, case: Decode, gb_s: float) -> dict[str, Any]:
    """One decode step over all slots, and with 50 % and 20 % of them live in the same buffers, against flash over all.

    For each share kept: ms, floor_ms (the bytes it must read at the copy bandwidth) and share, floor_ms / ms.
    """
    torch.manual_seed(0)
    caches = cache_copies(case, device)
    kv_heads, head_size = case.heads[1:]
    query = query_for(case, device)
    fresh = torch.randn(2, case.batch, kv_heads, 1, head_size, dtype=DTYPE, device=device)
    bias = torch.randint(1, 9, (case.batch, kv_heads, case.slots), device=device).float().log()
    result: dict[str, Any] = {"copies": len(caches), "bytes": case.floor_bytes(case.slots), "failures": []}
    for kept in KEPT:
        live = max(1, int(case.slots * kept))
        length = torch.full((case.batch,), live - 1, dtype=torch.int64, device=device)
        calls = [
            bindings.prepare_nexus_attention(kernels, (query, fresh[0], fresh[1], c[0], c[1], bias, length))
            for c in caches
        ]
        ms = timing.milliseconds(calls, device)
        result[f"ms_{kept:g}"] = ms
        result[f"floor_ms_{kept:g}"] = case.floor_bytes(live) / gb_s / 1e6
        result[f"share_{kept:g}"] = result[f"floor_ms_{kept:g}"] / ms
        inputs = (query, fresh[0], fresh[1], caches[-1][0], caches[-1][1], bias, length)
        error, wrong = output_failures(inputs, calls[-1], kept)
        result[f"relative_error_{kept:g}"] = error
        result["failures"] += wrong
    result |= flash_ms(query, caches)
    if result["ms_flash"] is not None:
        for kept in KEPT:
            result[f"speedup_{kept:g}"] = result["ms_flash"] / result[f"ms_{kept:g}"]
    return result


def flashinfer(device: torch.device, case: Decode) -> dict[str, Any]:
    """flashinfer's step over the full cache, as {"ms_flashinfer": ..., "flashinfer_error": ...}. By itself and last:
    the first use may compile for minutes; whatever it raises is only noted."""
    try:
        ms = flashinfer_times.flashinfer_ms(query_for(case, device), cache_copies(case, device))
        return {"ms_flashinfer": ms, "flashinfer_error": ""}
    except Exception as error:
        return {"ms_flashinfer": None, "flashinfer_error": report.first_line(error)}

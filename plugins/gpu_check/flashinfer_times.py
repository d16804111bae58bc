"""flashinfer's batch decode beside ours, where flashinfer is installed: the same bytes, seen as pages of 16 slots."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import timing
import torch

PAGE = 16
WORKSPACE_BYTES = 128 << 20


def missing() -> str:
    """Why flashinfer cannot be used; empty where it is installed."""
    return "" if importlib.util.find_spec("flashinfer") else "not installed"


def flashinfer_ms(query: torch.Tensor, caches: Sequence[torch.Tensor]) -> float:
    """Time of one decode step over whole caches, in ms. Raises whatever flashinfer raises.

    query [B,Hq,1,D]; caches [2,B,Hkv,slots,D] each, slots a multiple of 16. Only the time counts: read as pages, the
    slots of different heads change places. `plan` is not in it, as it is not in a serving loop's every layer.
    """
    import flashinfer

    device, (batch, query_heads, _, head_size) = query.device, query.shape
    kv_heads, slots = caches[0].shape[2:4]
    pages = slots // PAGE
    scratch = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    # Above a group of four flashinfer's own advice is its tensor-core kernel.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        scratch, "HND", use_tensor_cores=query_heads // kv_heads > 4
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(batch * pages, dtype=torch.int32, device=device),
        torch.full((batch,), PAGE, dtype=torch.int32, device=device),
        query_heads,
        kv_heads,
        head_size,
        PAGE,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    rows = query[:, :, 0].contiguous()
    paged = [cache.view(2, batch * pages, kv_heads, PAGE, head_size) for cache in caches]
    calls = [lambda p=p: wrapper.run(rows, (p[0], p[1])) for p in paged]
    return timing.milliseconds(calls, device)

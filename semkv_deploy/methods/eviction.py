"""The eviction rule that methods share: sinks stay, then the oldest slots go. In ONNX text, and as slow PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semkv_deploy.ops import compact_cache

if TYPE_CHECKING:
    from torch import Tensor

EVICT_OLDEST = """
    excess = Sub (clustered_length, target)
    over = Greater (excess, zero)
    evicted = Max (excess, zero)
    evicted_column = Unsqueeze (evicted, axis_1)
    is_sink = Less (slot, sinks)
    skip = Where (is_sink, zero, evicted_column)
    from_slot = Add (slot, skip)
    clustered_column = Unsqueeze (clustered_length, axis_1)
    exists = Less (from_slot, clustered_column)
    keep_row = Where (exists, from_slot, minus_one)
    keep_index = Unsqueeze (keep_row, axis_1)
"""
"""Evicts until `clustered_length` is `target`, after `text.SLOTS`.

`keep_index` `[B,1,C]` names the slots that stay; rows at or below the target keep all of theirs.
"""


def evict_oldest(state: dict[str, Tensor], target: Tensor, sinks: int) -> tuple[dict[str, Tensor], Tensor]:
    """The reference: the state after eviction, and how many slots `[B]` went."""
    import torch

    length = state["length"]
    batch, groups, capacity = state["slot_chunk"].shape
    keep = torch.full((batch, 1, capacity), -1)
    for b in range(batch):
        excess = max(int(length[b] - target[b]), 0)
        kept = [slot for slot in range(int(length[b])) if slot < sinks or slot >= sinks + excess]
        keep[b, 0, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    key, value, bias, new_length = compact_cache.reference(
        state["key_cache"], state["value_cache"], state["slot_bias"], keep
    )
    everywhere = keep.expand(batch, groups, capacity)
    metadata: dict[str, Any] = {
        name: state[name].gather(2, everywhere.clamp_min(0)).masked_fill(everywhere < 0, 0)
        for name in ("slot_position", "slot_chunk")
    }
    return {
        "key_cache": key,
        "value_cache": value,
        "slot_bias": bias,
        "length": new_length,
        **metadata,
    }, (length - target).clamp_min(0)

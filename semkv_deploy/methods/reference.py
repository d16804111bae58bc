"""What compressing a layer means, method by method, as slow and obvious PyTorch. Graphs are compared with this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semkv_deploy.methods.semanticache import SemantiCache
from semkv_deploy.ops import compact_cache, semantic_cluster

if TYPE_CHECKING:
    from torch import Tensor

    from semkv_deploy.methods.base import Method
    from semkv_deploy.model.config import ModelFacts, Rotary


def compress(
    method: Method,
    facts: ModelFacts,
    state: dict[str, Tensor],
    *,
    target: Tensor,
    sinks: int,
    recent: Tensor,
    thresholds: list[float],
) -> dict[str, Tensor]:
    """One layer compressed: inputs and outputs as in `methods.base`, outputs without their `_out`."""
    import torch

    method = method.for_model(facts)
    if isinstance(method, SemantiCache):
        state, level = _semanticache(method, facts, state, target, sinks, recent, thresholds)
    else:
        level = torch.where(state["length"] > target, 0, -1)
    state, evicted = _evict_oldest(state, target, sinks)
    return {**state, "level": level, "evicted": evicted}


def _semanticache(
    method: SemantiCache,
    facts: ModelFacts,
    state: dict[str, Tensor],
    target: Tensor,
    sinks: int,
    recent: Tensor,
    thresholds: list[float],
) -> tuple[dict[str, Tensor], Tensor]:
    import torch

    batch, groups, capacity = state["slot_chunk"].shape
    chunk_id = torch.full((batch, groups, len(thresholds), capacity), -1)
    for b in range(batch):
        for g in range(groups):
            # Sinks and window stay as they are; so do slots past the length, which are dead.
            for slot in range(sinks, int(state["length"][b] - recent[b])):
                chunk, delimiter = divmod(int(state["slot_chunk"][b, g, slot]), 2)
                if not (delimiter and method.keeps_delimiters):
                    chunk_id[b, g, :, slot] = chunk // method.chunk_width
    unrotated = method.merge_keys == "unrotated"
    keys = state["key_cache"]
    mergeable = _rotary(facts).rotate(keys, -state["slot_position"]) if unrotated else keys
    key, value, bias, length, source, level_taken = semantic_cluster.reference(
        mergeable,
        state["value_cache"],
        state["slot_bias"],
        state["length"],
        chunk_id,
        torch.tensor(thresholds),
        target,
        span=method.span,
    )
    seed = source.clamp_min(0)
    position, chunks = state["slot_position"].gather(2, seed), state["slot_chunk"].gather(2, seed)
    if unrotated:
        key = _rotary(facts).rotate(key, position)
        for b, h, slot in torch.cartesian_prod(*(torch.arange(size) for size in bias.shape)).tolist():
            origin = int(seed[b, h if groups > 1 else 0, slot])
            if bias[b, h, slot] == state["slot_bias"][b, h, origin]:
                # Merged with nothing: back to the very bits it came from.
                key[b, h, slot] = keys[b, h, origin]
    dead = source < 0
    return {
        "key_cache": key,
        "value_cache": value,
        "slot_bias": bias,
        "length": length,
        "slot_position": position.masked_fill(dead, 0),
        "slot_chunk": chunks.masked_fill(dead, 0),
    }, level_taken


def _rotary(facts: ModelFacts) -> Rotary:
    assert facts.rotary is not None, "`for_model` chose cached keys"
    return facts.rotary


def _evict_oldest(state: dict[str, Tensor], target: Tensor, sinks: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sinks stay, then the oldest slots go until `length` is at most `target`."""
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

"""H2O (arXiv 2306.14048) under a mask: what else as many slots could hold of earlier turns.

Of n slots for what came before a turn half hold the newest tokens and half those that got most attention so far, summed
over all earlier rows, for each layer and KV head of its own. Attention is that of the full cache, where H2O's own would
have lost what was evicted: that is in its favour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from semkv_deploy.train.layout import PAD, PINNED, Batch, causal, sight
from semkv_deploy.train.objective import Look, attention_weights

if TYPE_CHECKING:
    from semkv_deploy.export.attention import Attend, LayerSpec


def heavy_hitters(batch: Batch, looks: Mapping[int, Look]) -> Attend:
    """Attention in which text rows see X, their own turn and, of earlier turns, what H2O keeps in each KV head.

    Args:
        batch: of one dialogue.
        looks: of all layers, with a full cache.
    """
    masks = {layer: seen_by_heads(batch, look) for layer, look in looks.items()}

    def attend(layer: int, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value, seen = (each.repeat_interleave(groups, 1) for each in (key, value, masks[layer]))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=spec.scale)

    return attend


def seen_by_heads(batch: Batch, look: Look) -> Tensor:
    """What text rows see in one layer, bool `[1,Hkv,T,T]`."""
    rows, heads = batch.ids.shape[1], look.key.shape[1]
    weights = attention_weights(look.query, look.key, causal(batch), look.scale)
    mass = weights.unflatten(1, (heads, -1)).sum(2)[0]
    turn, slots = batch.turn[0], sight(batch).text_nexus[0].sum(-1)
    seen = sight(batch).text_text.expand(heads, -1, -1).clone()
    number = torch.arange(rows, device=turn.device)
    for of in range(1, int(turn.max()) + 1):
        own = turn == of
        before = (turn != PAD) & (turn < of)
        earlier = number[before & (turn != PINNED)]
        kept = int(slots[own].max())
        recent = min(kept // 2, len(earlier))
        older = earlier[: len(earlier) - recent]
        chosen = torch.zeros(heads, rows, dtype=torch.bool, device=turn.device)
        chosen[:, earlier[len(earlier) - recent :]] = True
        got = mass[:, before][:, :, older].sum(1)
        heaviest = got.topk(min(kept - recent, len(older)), -1).indices
        chosen.scatter_(1, older[heaviest], True)
        seen[:, own] |= chosen[:, None]
    return seen[None]

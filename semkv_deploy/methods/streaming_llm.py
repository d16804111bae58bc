"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a recent window; everything between is evicted.

Positions stay true positions (the paper renumbers them inside the cache); they come from the position counter like
everyone's here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from semkv_deploy.methods import text
from semkv_deploy.methods.base import State
from semkv_deploy.methods.eviction import EVICT_OLDEST, evict_oldest
from semkv_deploy.methods.isolated_turns import IsolatesTurns
from semkv_deploy.methods.layout import COMPRESS

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from semkv_deploy.model.config import ModelFacts


class StreamingLLM(IsolatesTurns):
    """Keeps the first `sinks` slots and the most recent ones; with `turns=isolated`, of every turn the most recent."""

    kind: Literal["streaming-llm"] = "streaming-llm"

    def compressor(self, model: ModelFacts) -> onnx.ModelProto:
        return text.parse_compressor(
            model,
            cluster_groups=1,
            inputs=("sinks", "target"),
            operators=("CompactCache",),
            body=f"""
            {text.SLOTS}
            clustered_length = Identity (length)
            {EVICT_OLDEST}
            key_cache_out, value_cache_out, slot_bias_out, length_out =
                semkv.CompactCache (key_cache, value_cache, slot_bias, keep_index)
            final_index = Identity (keep_index)
            {text.MOVE_METADATA}
            level = Where (over, zero, minus_one)
            """,
        )

    def reference(self, program: str) -> Callable[..., State]:
        return {COMPRESS: _compress}[program]


def _compress(model: ModelFacts, state: State, *, target: Tensor, sinks: int, **_: Any) -> State:
    import torch

    level = torch.where(state["length"] > target, 0, -1)
    after, evicted = evict_oldest(state, target, sinks)
    return {**after, "level": level, "evicted": evicted}

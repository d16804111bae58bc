"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a recent window; everything between is evicted.

Positions stay true positions (the paper renumbers them inside the cache); they come from the position counter like
everyone's here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from semkv_deploy.methods import text
from semkv_deploy.methods.base import Method

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.model.config import ModelFacts


class StreamingLLM(Method):
    """Keeps the first `sinks` slots and the most recent ones."""

    kind: Literal["streaming-llm"] = "streaming-llm"

    def compressor(self, facts: ModelFacts) -> onnx.ModelProto:
        return text.parse_compressor(
            facts,
            groups=1,
            inputs=("sinks", "target"),
            operators=("CompactCache",),
            body=f"""
            {text.SLOTS}
            clustered_length = Identity (length)
            {text.EVICT_OLDEST}
            key_cache_out, value_cache_out, slot_bias_out, length_out =
                semkv.CompactCache (key_cache, value_cache, slot_bias, keep_index)
            final_index = Identity (keep_index)
            {text.MOVE_METADATA}
            level = Where (over, zero, minus_one)
            """,
        )

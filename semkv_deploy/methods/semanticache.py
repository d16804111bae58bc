"""SemantiCache (Wu et al., arXiv 2603.14303): greedy seed clustering inside semantic chunks, mean cores, log-size bias.

The paper's knob is the similarity threshold; a budget is met by choosing it. Ours is a hard cap, so a layer has a
ladder of falling thresholds, tried in order until the result fits:

* "paper": delimiters kept, chunks apart, one threshold.
* "graded" (default): delimiters may merge into the chunk they close, `neighbours` chunks count as one, and thresholds
  fall in small steps from the calibrated one. At tight budgets a lower threshold costs more than wider chunks do, and
  merging far past the target costs more than trying another step (`semkv-deploy evaluate` measures all of these).

What still does not fit after the last level is evicted: sinks stay, then the oldest slots go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from semkv_deploy.methods import rotation, text
from semkv_deploy.methods.base import Method

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.model.config import ModelFacts

LADDER_STEP = 0.02
LADDER_STEPS = 24
UNCALIBRATED = 0.95
PAPER_THRESHOLD = 0.7
"""The paper's choice for 20 % kept (its Table 5)."""


class SemantiCache(Method):
    """Merges similar keys of a chunk into cores; old cores are merged again, weighted by their size.

    Attributes:
        recent: share of the target that is a recent window and never merged.
        cluster_by: "layer": all KV heads of a layer share clusters (similarity averaged); "head": each has its own.
        merge_keys: "cached": keys are compared and averaged as they lie in the cache, rotated by their positions;
            "unrotated": rotated back first, and the core rotated to its seed's position; "auto": unrotated where the
            model has one rotary table, else cached. (The paper says nothing; unrotated costs a fifth less KL.)
        ladder: how a budget is met, see the module.
        threshold: fixes the first threshold; None takes the one calibrated for layer and budget.
        span: slots further apart than this never merge.
        neighbours: chunks counted as one where the paper's form does not fit.
    """

    kind: Literal["semanticache"] = "semanticache"
    recent: float = Field(default=0.5, ge=0, lt=1)
    cluster_by: Literal["layer", "head"] = "layer"
    merge_keys: Literal["auto", "cached", "unrotated"] = "auto"
    ladder: Literal["graded", "paper"] = "graded"
    threshold: float | None = Field(default=None, gt=-1, le=1)
    span: Literal[32, 64] = 64
    neighbours: int = Field(default=16, ge=1)

    merges: ClassVar[bool] = True

    def for_model(self, facts: ModelFacts) -> SemantiCache:
        if self.merge_keys != "auto":
            return self
        return self.model_copy(update={"merge_keys": "unrotated" if rotation.can_unrotate(facts) else "cached"})

    def groups(self, kv_heads: int) -> int:
        return kv_heads if self.cluster_by == "head" else 1

    def recent_slots(self, target: int) -> int:
        return int(self.recent * target)

    def thresholds(self, calibrated: float | None) -> list[float]:
        start = self.threshold
        if self.ladder == "paper":
            return [start if start is not None else PAPER_THRESHOLD]
        if start is None:
            # One step down: later compressions meet cores, which are less alike than the tokens calibrated on.
            start = calibrated - LADDER_STEP if calibrated is not None else UNCALIBRATED
        return [round(max(start - LADDER_STEP * step, -1.0), 4) for step in range(LADDER_STEPS)]

    @property
    def keeps_delimiters(self) -> bool:
        """Whether delimiters stay apart from the chunk they close."""
        return self.ladder == "paper"

    @property
    def chunk_width(self) -> int:
        """Chunks that count as one."""
        return 1 if self.ladder == "paper" else self.neighbours

    def compressor(self, facts: ModelFacts) -> onnx.ModelProto:
        if self.merge_keys == "auto":
            return self.for_model(facts).compressor(facts)
        return text.parse_compressor(
            facts,
            groups=self.groups(facts.kv_heads),
            inputs=("thresholds", "target", "sinks", "recent"),
            operators=("SemanticCluster", "CompactCache"),
            body=f"""
            {text.SLOTS}
            before_window = Sub (length, recent)
            {self._cluster(facts)}
            {text.EVICT_OLDEST}
            key_cache_out, value_cache_out, slot_bias_out, length_out =
                semkv.CompactCache (clustered_key, clustered_value, clustered_bias, keep_index)

            kept_none = Less (keep_index, zero)
            kept_from = Max (keep_index, zero)
            source_shape = Shape (source_slot)
            kept_elements = Expand (kept_from, source_shape)
            kept_source = GatherElements <axis = 2> (source_slot, kept_elements)
            final_index = Where (kept_none, minus_one, kept_source)
            {text.MOVE_METADATA}
            """,
        )

    def calibration_graph(self, facts: ModelFacts) -> onnx.ModelProto:
        """Clusters every slot, unconditionally."""
        if self.merge_keys == "auto":
            return self.for_model(facts).calibration_graph(facts)
        return text.parse_compressor(
            facts,
            groups=self.groups(facts.kv_heads),
            inputs=("thresholds",),
            operators=("SemanticCluster",),
            body=f"""
            sinks = Constant <value = int64 {{0}}> ()
            target = Sub (length, length)
            {text.SLOTS}
            before_window = Identity (length)
            {self._cluster(facts)}
            length_out = Identity (clustered_length)
            """,
            outputs=("length_out",),
        )

    def _cluster(self, facts: ModelFacts) -> str:
        """Chunk ids, the same at every level, and the clustered layer."""
        unrotated = self.merge_keys == "unrotated"
        before = (
            rotation.UNROTATE.format(**rotation.parameters(facts)) if unrotated else "mergeable = Identity (key_cache)"
        )
        return f"""
            keeps_delimiters = Constant <value = bool {{{int(self.keeps_delimiters)}}}> ()
            chunk_width = Constant <value = int64 {{{self.chunk_width}}}> ()
            before_window_column = Unsqueeze (before_window, axis_1)
            in_window = GreaterOrEqual (slot, before_window_column)
            in_sinks = Less (slot, sinks)
            pinned_row = Or (in_window, in_sinks)
            pinned = Unsqueeze (pinned_row, axis_1)
            delimiter_bit = Mod (slot_chunk, two)
            is_delimiter = Equal (delimiter_bit, one)
            kept_delimiter = And (is_delimiter, keeps_delimiters)
            untouched = Or (pinned, kept_delimiter)
            chunk_number = Div (slot_chunk, two)
            wide_chunk = Div (chunk_number, chunk_width)
            slot_chunk_id = Where (untouched, minus_one, wide_chunk)
            level_axis = Constant <value = int64[1] {{2}}> ()
            one_level = Unsqueeze (slot_chunk_id, level_axis)
            level_count = Shape (thresholds)
            batch_and_groups = Constant <value = int64[2] {{1, 1}}> ()
            one_slot = Constant <value = int64[1] {{1}}> ()
            all_levels = Concat <axis = 0> (batch_and_groups, level_count, one_slot)
            chunk_id = Expand (one_level, all_levels)
            {before}
            merged_key, clustered_value, clustered_bias, clustered_length, source_slot, level =
                semkv.SemanticCluster <span: int = {self.span}> (
                    mergeable, value_cache, slot_bias, length, chunk_id, thresholds, target)
            {rotation.ROTATE_BACK if unrotated else "clustered_key = Identity (merged_key)"}
        """

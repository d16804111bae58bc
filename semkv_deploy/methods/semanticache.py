"""SemantiCache (Wu et al., arXiv 2603.14303): greedy seed clustering inside semantic chunks, mean cores, log-size bias.

The paper's knob is the similarity threshold; a budget is met by choosing it. Ours is a hard cap, so a layer has a
ladder of levels, tried in order until the result fits:

* "paper": delimiters kept, chunks apart, one threshold; then eviction.
* "graded" (default): thresholds fall step by step; at each one first the paper's form (delimiters kept, chunks
  apart), then delimiters merged into the chunk they close and `neighbours` chunks merged. Lowering the threshold
  costs more KL than widening the chunks does (`semkv-deploy evaluate` shows both), so the threshold falls last.

What still does not fit after the last level is evicted: sinks stay, then the oldest slots go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from semkv_deploy.methods import graph, rotation
from semkv_deploy.methods.base import Method

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.facts import ModelFacts

LADDER_STEP = 0.05
LADDER_STEPS = 12
UNCALIBRATED = 0.95
PAPER_THRESHOLD = 0.7
"""The paper's choice for 20 % kept (its Table 5)."""


class Level(NamedTuple):
    """One level: how many steps the threshold is lowered, whether delimiters stay apart, chunks that count as one."""

    step: int
    keep_delimiters: bool
    neighbours: int


class SemantiCache(Method):
    """Merges similar keys of a chunk into cores; old cores are merged again, weighted by their size.

    Attributes:
        recent: share of the target that is a recent window and never merged.
        cluster_by: "layer": all KV heads of a layer share clusters (similarity averaged); "head": each has its own.
        merge_keys: "cached": keys are compared and averaged as they lie in the cache, rotated by their positions;
            "unrotated": rotated back first, and the core rotated to its seed's position.
        ladder: how a budget is met, see the module.
        threshold: fixes the first threshold; None takes the one calibrated for layer and budget.
        span: slots further apart than this never merge.
        neighbours: chunks counted as one where the paper's form does not fit.
    """

    kind: Literal["semanticache"] = "semanticache"
    recent: float = Field(default=0.5, ge=0, lt=1)
    cluster_by: Literal["layer", "head"] = "layer"
    merge_keys: Literal["cached", "unrotated"] = "unrotated"
    ladder: Literal["graded", "paper"] = "graded"
    threshold: float | None = Field(default=None, gt=-1, le=1)
    span: Literal[32, 64] = 64
    neighbours: int = Field(default=16, ge=1)

    merges: ClassVar[bool] = True

    def groups(self, kv_heads: int) -> int:
        return kv_heads if self.cluster_by == "head" else 1

    def recent_slots(self, target: int) -> int:
        return int(self.recent * target)

    def levels(self) -> list[Level]:
        """The ladder, in the order it is tried."""
        if self.ladder == "paper":
            return [Level(0, True, 1)]
        return [Level(step, False, self.neighbours) for step in range(LADDER_STEPS)]

    def thresholds(self, calibrated: float | None) -> list[float]:
        start = self.threshold
        if start is None:
            start = calibrated if calibrated is not None else UNCALIBRATED
        if self.ladder == "paper":
            return [start]
        return [round(max(start - LADDER_STEP * level.step, -1.0), 4) for level in self.levels()]

    def compressor(self, facts: ModelFacts) -> onnx.ModelProto:
        return graph.parse_compressor(
            facts,
            groups=self.groups(facts.kv_heads),
            inputs=("thresholds", "target", "sinks", "recent"),
            operators=("SemanticCluster", "CompactCache"),
            body=f"""
            {graph.SLOTS}
            before_window = Sub (length, recent)
            {self._cluster(self.levels(), facts)}
            {graph.EVICT_OLDEST}
            key_cache_out, value_cache_out, slot_bias_out, length_out =
                semkv.CompactCache (clustered_key, clustered_value, clustered_bias, keep_index)

            kept_none = Less (keep_index, zero)
            kept_from = Max (keep_index, zero)
            source_shape = Shape (source_slot)
            kept_elements = Expand (kept_from, source_shape)
            kept_source = GatherElements <axis = 2> (source_slot, kept_elements)
            final_index = Where (kept_none, minus_one, kept_source)
            {graph.MOVE_METADATA}
            """,
        )

    def calibration_graph(self, facts: ModelFacts) -> onnx.ModelProto:
        """Clusters everything at the level the ladder mostly works at: all slots, unconditionally."""
        level = Level(0, True, 1) if self.ladder == "paper" else Level(0, False, self.neighbours)
        return graph.parse_compressor(
            facts,
            groups=self.groups(facts.kv_heads),
            inputs=("thresholds",),
            operators=("SemanticCluster",),
            body=f"""
            sinks = Constant <value = int64 {{0}}> ()
            target = Sub (length, length)
            {graph.SLOTS}
            before_window = Identity (length)
            {self._cluster([level], facts)}
            length_out = Identity (clustered_length)
            """,
            outputs=("length_out",),
        )

    def _cluster(self, levels: Sequence[Level], facts: ModelFacts) -> str:
        """Chunk ids of every level, and the clustered layer."""
        unrotated = self.merge_keys == "unrotated"
        keeps, width = _row(level.keep_delimiters for level in levels), _row(level.neighbours for level in levels)
        before = (
            rotation.UNROTATE.format(**rotation.parameters(facts)) if unrotated else "mergeable = Identity (key_cache)"
        )
        return f"""
            row_axes = Constant <value = int64[2] {{1, 2}}> ()
            level_axis = Constant <value = int64[1] {{2}}> ()
            level_keeps = Constant <value = bool[{len(levels)}, 1] {{{keeps}}}> ()
            level_width = Constant <value = int64[{len(levels)}, 1] {{{width}}}> ()
            before_window_column = Unsqueeze (before_window, axis_1)
            in_window = GreaterOrEqual (slot, before_window_column)
            in_sinks = Less (slot, sinks)
            pinned_row = Or (in_window, in_sinks)
            pinned = Unsqueeze (pinned_row, row_axes)
            chunk = Unsqueeze (slot_chunk, level_axis)
            delimiter_bit = Mod (chunk, two)
            is_delimiter = Equal (delimiter_bit, one)
            kept_delimiter = And (is_delimiter, level_keeps)
            untouched = Or (pinned, kept_delimiter)
            chunk_number = Div (chunk, two)
            wide_chunk = Div (chunk_number, level_width)
            chunk_id = Where (untouched, minus_one, wide_chunk)
            {before}
            merged_key, clustered_value, clustered_bias, clustered_length, source_slot, level =
                semkv.SemanticCluster <span: int = {self.span}> (
                    mergeable, value_cache, slot_bias, length, chunk_id, thresholds, target)
            {rotation.ROTATE_BACK if unrotated else "clustered_key = Identity (merged_key)"}
        """


def _row(values: Iterable[int]) -> str:
    return ", ".join(str(int(value)) for value in values)

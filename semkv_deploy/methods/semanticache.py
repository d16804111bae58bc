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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from semkv_deploy.methods import rotation, text
from semkv_deploy.methods.base import Method, State
from semkv_deploy.methods.behaviours import NO_MERGE
from semkv_deploy.methods.calibration import Settings
from semkv_deploy.methods.eviction import EVICT_OLDEST, evict_oldest
from semkv_deploy.methods.layout import COMPRESS
from semkv_deploy.ops import semantic_cluster

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.methods.calibration import CalibrationText
    from semkv_deploy.model.config import ModelFacts, Rotary

LADDER_STEP = 0.02
LADDER_STEPS = 24
UNCALIBRATED = 0.95
PAPER_THRESHOLD = 0.7
"""The paper's choice for 20 % kept (its Table 5)."""


CURVE = tuple(round(0.98 - 0.04 * step, 2) for step in range(20))
"""Thresholds of the calibration curve, falling."""


class ThresholdCurve(Settings):
    """Share of slots that each cache group keeps by threshold, on the calibration text.

    A group's keys decide how much merges at a threshold, and groups differ widely.

    Attributes:
        tokens: length of the text.
        thresholds: of the curve.
        kept: `[groups][thresholds]` shares.
    """

    tokens: int
    thresholds: tuple[float, ...]
    kept: tuple[tuple[float, ...], ...]


class SemantiCache(Method):
    """Merges similar keys of a chunk into cores; old cores are merged again, weighted by their size.

    Attributes:
        recent: share of the target that is a recent window and never merged.
        cluster_by: "layer": the KV heads of a cache group share clusters (similarity averaged); "head": each its own.
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

    def resolve(self, model: ModelFacts) -> SemantiCache:
        if self.merge_keys != "auto":
            return self
        return self.model_copy(update={"merge_keys": "unrotated" if rotation.can_unrotate(model) else "cached"})

    @property
    def clusters_by_head(self) -> bool:
        return self.cluster_by == "head"

    @property
    def recent_share(self) -> float:
        return self.recent

    @property
    def unrotates(self) -> bool:
        return self.merge_keys != "cached"

    @property
    def merge_span(self) -> int:
        return self.span

    @property
    def ladder_levels(self) -> int:
        return 1 if self.ladder == "paper" else LADDER_STEPS

    def thresholds(self, calibrated: float | None) -> list[float]:
        """A group's thresholds, tried in order, given the one calibrated for the budget (None: none was)."""
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

    def compressor(self, model: ModelFacts) -> onnx.ModelProto:
        if self.merge_keys == "auto":
            return self.resolve(model).compressor(model)
        return text.parse_compressor(
            model,
            cluster_groups=self.cluster_groups(model.kv_heads),
            inputs=("thresholds", "target", "sinks", "recent"),
            operators=("SemanticCluster", "CompactCache"),
            body=f"""
            {text.SLOTS}
            before_window = Sub (length, recent)
            {self._cluster(model)}
            {EVICT_OLDEST}
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

    def calibrate(self, model: ModelFacts, text: CalibrationText) -> ThresholdCurve:
        """Clusters the whole text at every threshold of a curve, group by group."""
        count, kept = len(text.chunk), []
        graphs: dict[int, onnx.ModelProto] = {}
        for number, group in enumerate(text.groups):
            heads = len(group.heads)
            if heads not in graphs:
                graphs[heads] = self.calibration_graph(model.model_copy(update={"kv_heads": heads}))
            buffers = {f"{name}_cache": text.read(name, number) for name in ("key", "value")}
            column = np.zeros((2, 1, self.cluster_groups(heads), group.capacity), np.int64)
            column[0, 0, :, :count], column[1, 0, :, :count] = np.arange(count), text.chunk
            feeds = {
                **buffers,
                "slot_bias": np.zeros(buffers["key_cache"].shape[:3], np.float32),
                "length": np.array([count], np.int64),
                "slot_position": column[0],
                "slot_chunk": column[1],
            }
            shares = []
            for threshold in CURVE:
                outputs = text.run(graphs[heads], {**feeds, "thresholds": np.array([threshold], np.float32)})
                shares.append(round(int(outputs["length_out"][0]) / count, 4))
            kept.append(tuple(shares))
            text.progress((number + 1) / len(text.groups))
        return ThresholdCurve(tokens=count, thresholds=CURVE, kept=tuple(kept))

    def group_inputs(
        self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None
    ) -> dict[str, tuple[Any, ...]]:
        """Adds each group's ladder of thresholds.

        A full group is compressed from capacity to keep_slots with sinks and window untouched; what lies between must
        shrink by the rest, and the ladder begins at the threshold that does so on the calibration text.
        """
        ladders = []
        for number, group in enumerate(profile.groups):
            calibrated = None
            if isinstance(settings, ThresholdCurve):
                untouched = self.sinks + self.recent_slots(group.keep_slots)
                share = (group.keep_slots - untouched) / (group.capacity - untouched)
                # Shares fall with the threshold; np.interp wants rising abscissae.
                kept = settings.kept[number]
                calibrated = round(float(np.interp(share, kept[::-1], settings.thresholds[::-1])), 2)
            ladder = self.thresholds(calibrated)
            ladders.append(tuple(NO_MERGE for _ in ladder) if model.windows[group.layer] > 0 else tuple(ladder))
        return {**super().group_inputs(model, profile, settings), "thresholds": tuple(ladders)}

    def calibration_graph(self, model: ModelFacts) -> onnx.ModelProto:
        """A graph that clusters every slot of one group at one threshold, unconditionally; its output is `length_out`.

        Its inputs are the state and `thresholds` `[1]`.
        """
        if self.merge_keys == "auto":
            return self.resolve(model).calibration_graph(model)
        return text.parse_compressor(
            model,
            cluster_groups=self.cluster_groups(model.kv_heads),
            inputs=("thresholds",),
            operators=("SemanticCluster",),
            body=f"""
            sinks = Constant <value = int64 {{0}}> ()
            target = Sub (length, length)
            {text.SLOTS}
            before_window = Identity (length)
            {self._cluster(model)}
            length_out = Identity (clustered_length)
            """,
            outputs=("length_out",),
        )

    def _cluster(self, model: ModelFacts) -> str:
        """Chunk ids, the same at every level, and the clustered layer."""
        unrotated = self.merge_keys == "unrotated"
        before = (
            rotation.UNROTATE.format(**rotation.parameters(model)) if unrotated else "mergeable = Identity (key_cache)"
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

    def reference(self, program: str) -> Callable[..., State]:
        return {COMPRESS: self._compress}[program]

    def _compress(
        self, model: ModelFacts, state: State, *, target: Tensor, sinks: int, recent: Tensor, thresholds: list[float]
    ) -> State:
        method = self.resolve(model)
        clustered, level = method._clustered(model, state, target, sinks, recent, thresholds)
        after, evicted = evict_oldest(clustered, target, sinks)
        return {**after, "level": level, "evicted": evicted}

    def _clustered(
        self, model: ModelFacts, state: State, target: Tensor, sinks: int, recent: Tensor, thresholds: list[float]
    ) -> tuple[State, Tensor]:
        import torch

        batch, groups, capacity = state["slot_chunk"].shape
        chunk_id = torch.full((batch, groups, len(thresholds), capacity), -1)
        for b in range(batch):
            for g in range(groups):
                # Sinks and window stay as they are; so do slots past the length, which are dead.
                for slot in range(sinks, int(state["length"][b] - recent[b])):
                    chunk, delimiter = divmod(int(state["slot_chunk"][b, g, slot]), 2)
                    if not (delimiter and self.keeps_delimiters):
                        chunk_id[b, g, :, slot] = chunk // self.chunk_width
        unrotated = self.merge_keys == "unrotated"
        keys = state["key_cache"]
        mergeable = _rotary(model).rotate(keys, -state["slot_position"]) if unrotated else keys
        key, value, bias, length, source, level_taken = semantic_cluster.reference(
            mergeable,
            state["value_cache"],
            state["slot_bias"],
            state["length"],
            chunk_id,
            torch.tensor(thresholds),
            target,
            span=self.span,
        )
        seed = source.clamp_min(0)
        position, chunks = state["slot_position"].gather(2, seed), state["slot_chunk"].gather(2, seed)
        if unrotated:
            key = _rotary(model).rotate(key, position)
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


def _rotary(model: ModelFacts) -> Rotary:
    assert model.rotary is not None, "`resolve` chose cached keys"
    return model.rotary

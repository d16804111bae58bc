"""SemantiCache (Wu et al., arXiv 2603.14303): greedy seed clustering inside semantic chunks, mean cores, log-size bias.

The paper's knob is the similarity threshold; a budget is met by choosing it. Ours is a hard cap, so a layer has a
ladder of falling thresholds, tried in order until the result fits:

* "graded" (default): made for each layer and budget from the calibration curve (`threshold_curve`), in small steps of
  the share kept: merging past the target costs more than trying another step.
* "paper": one threshold.

What still does not fit after the last level is evicted: sinks stay, then the oldest slots go. `form="paper"` is the
paper's method; the defaults differ from it where `semkv-deploy evaluate` and recall of a passkey said so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from semkv_deploy.methods import rotation, text
from semkv_deploy.methods.base import State
from semkv_deploy.methods.behaviours import NO_MERGE
from semkv_deploy.methods.eviction import EVICT_OLDEST, evict_oldest
from semkv_deploy.methods.isolated_turns import IsolatesTurns
from semkv_deploy.methods.layout import COMPRESS
from semkv_deploy.methods.semanticache_cluster import cluster_state, cluster_text, native_cluster_text
from semkv_deploy.methods.threshold_curve import LEVELS, THRESHOLDS, ThresholdCurve, measure

if TYPE_CHECKING:
    import onnx
    from torch import Tensor
    from typing_extensions import Self

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.methods.calibration import CalibrationText, Settings
    from semkv_deploy.model.cache_groups import CacheGroup
    from semkv_deploy.model.config import ModelFacts

LADDER_STEP = 0.02
"""From one threshold of a ladder to the next, where none was calibrated."""

UNCALIBRATED = 0.95
PAPER_THRESHOLD = 0.7
"""The paper's choice for 20 % kept (its Table 5)."""

ONE_LEVEL: dict[str, Any] = {"ladder": "paper", "delimiters": "keep", "neighbours": 1}
PAPER: dict[str, Any] = {
    **ONE_LEVEL,
    "sinks": 0,
    "recent": 0.0,
    "cluster_by": "layer",
    "merge_keys": "cached",
    "merge": "keys_and_values",
    "center": False,
}
"""The paper's form (arXiv 2603.14303, algorithm 1 and equations 1-4); what it leaves open as in most readings."""


class SemantiCache(IsolatesTurns):
    """Merges similar keys of a chunk into cores; old cores are merged again, weighted by their size.

    Attributes:
        form: "paper" gives every option that is not given the paper's value (`PAPER`); "tuned": the defaults below.
        recent: share of the target that is a recent window and never merged.
        cluster_by: "layer": the KV heads of a cache group share clusters (similarity averaged); "head": each its own.
        merge_keys: "cached": keys are compared and averaged as they lie in the cache, rotated by their positions;
            "unrotated": rotated back first, and the core rotated to its seed's position; "auto": unrotated where the
            model has one rotary table, else cached. (The paper says nothing; unrotated costs a fifth less KL.)
        merge: what a core is: "keys_and_values": its members' mean key and mean value (the paper's equation 3);
            "values": its seed's key, as it is, and the mean value (kvpress's MergingPress), which costs a fifth less KL
            at half of the cache kept and a tenth less at a fifth. Its bias is log(size) either way.
        center: keys are compared after the group's mean key, over live slots, is taken from them: by what they do not
            have in common. (On SmolLM2 it nearly doubles KL.)
        delimiters: "keep": never merged (the paper's equation 1); "apart": merged with delimiters only, so that
            repeated ones become one; "merge": part of the chunk that they close.
        ladder: how a budget is met, see the module; "paper" also changes the defaults of `delimiters` (keep) and
            `neighbours` (1).
        threshold: fixes the first threshold; None takes the one calibrated for layer and budget.
        span: slots further apart than this never merge.
        neighbours: chunks counted as one.
    """

    kind: Literal["semanticache"] = "semanticache"
    form: Literal["tuned", "paper"] = "tuned"
    recent: float = Field(default=0.5, ge=0, lt=1)
    cluster_by: Literal["layer", "head"] = "layer"
    merge_keys: Literal["auto", "cached", "unrotated"] = "auto"
    merge: Literal["keys_and_values", "values"] = "values"
    center: bool = False
    delimiters: Literal["keep", "apart", "merge"] = "merge"
    ladder: Literal["graded", "paper"] = "graded"
    threshold: float | None = Field(default=None, gt=-1, le=1)
    span: Literal[32, 64] = 64
    neighbours: int = Field(default=16, ge=1)

    merges: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, given: Any) -> Any:
        """Fills in what `form` and `ladder` stand for; what is given wins."""
        if not isinstance(given, Mapping):
            return given
        preset = PAPER if given.get("form") == "paper" else ONE_LEVEL if given.get("ladder") == "paper" else {}
        return {**preset, **given}

    def resolve(self, model: ModelFacts) -> Self:
        method = super().resolve(model)
        if method.merge_keys != "auto":
            return method
        return method.model_copy(update={"merge_keys": "unrotated" if rotation.can_unrotate(model) else "cached"})

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
    def merges_keys(self) -> bool:
        return self.merge == "keys_and_values"

    @property
    def merge_span(self) -> int:
        return self.span

    @property
    def ladder_levels(self) -> int:
        return 1 if self.ladder == "paper" else LEVELS

    def thresholds(self, curve: ThresholdCurve | None = None, group: int = 0, share: float = 1.0) -> list[float]:
        """A group's thresholds, tried in order.

        Args:
            curve: what calibration measured; None where there was none.
            share: of the slots that may merge, how much is to be kept.
        """
        start = self.threshold
        if self.ladder == "paper":
            return [start if start is not None else PAPER_THRESHOLD]
        if start is None and curve is not None:
            return curve.ladder(group, share)
        start = UNCALIBRATED if start is None else start
        return [round(max(start - LADDER_STEP * step, -1.0), 4) for step in range(LEVELS)]

    def compressor(self, model: ModelFacts) -> onnx.ModelProto:
        method = self.resolve(model)
        return method._compressor(model, cluster_text(method, model), "SemanticCluster", "CompactCache")

    def native_compressor(self, model: ModelFacts) -> onnx.ModelProto:
        method = self.resolve(model)
        if method.center:
            return method.compressor(model)
        return method._compressor(model, native_cluster_text(method, model), "CompactCache")

    def _compressor(self, model: ModelFacts, clustering: str, *operators: str) -> onnx.ModelProto:
        """The graph around the text that clusters; `operators` have bodies."""
        return text.parse_compressor(
            model,
            cluster_groups=self.cluster_groups(model.kv_heads),
            inputs=("thresholds", "target", "sinks", "recent"),
            operators=operators,
            body=f"""
            {text.SLOTS}
            before_window = Sub (length, recent)
            {clustering}
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

            def kept_at(threshold: float, graph: onnx.ModelProto = graphs[heads], feeds: Any = feeds) -> float:
                outputs = text.run(graph, {**feeds, "thresholds": np.array([threshold], np.float32)})
                return int(outputs["length_out"][0]) / count

            kept.append(measure(kept_at))
            text.progress((number + 1) / len(text.groups))
        return ThresholdCurve(tokens=count, thresholds=THRESHOLDS, kept=tuple(kept))

    def group_inputs(
        self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None
    ) -> dict[str, tuple[Any, ...]]:
        """Adds each group's ladder of thresholds.

        A full group is compressed from capacity to keep_slots with sinks and window untouched; what lies between must
        shrink by the rest, and the ladder begins at the threshold that does so on the calibration text.
        """
        curve = settings if isinstance(settings, ThresholdCurve) else None
        ladders = []
        for number, group in enumerate(profile.groups):
            if model.windows[group.layer] > 0:
                ladders.append((NO_MERGE,) * self.ladder_levels)
            else:
                ladders.append(tuple(self.thresholds(curve, number, self.kept_share(group))))
        return {**super().group_inputs(model, profile, settings), "thresholds": tuple(ladders)}

    def warnings(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[str]:
        """Names layers that merge more than twice what is asked, so that half of their slots and more stay unused."""
        if not isinstance(settings, ThresholdCurve) or profile.budget == 1:
            return []

        def wasted(number: int, group: CacheGroup) -> bool:
            share = self.kept_share(group)
            first = self.thresholds(settings, number, share)[0]
            return model.windows[group.layer] == 0 and settings.kept_at(number, first) < share / 2

        layers = sorted({group.layer for number, group in enumerate(profile.groups) if wasted(number, group)})
        if not layers:
            return []
        return [
            f"budget {profile.budget:g} is not used: layers {', '.join(map(str, layers))} keep less than half "
            "of the slots they may at their first threshold (calibration text); one nearer 1 keeps more"
        ]

    def kept_share(self, group: CacheGroup) -> float:
        """Of the slots of a full group that may merge, the share that is to be kept."""
        untouched = self.sinks + self.recent_slots(group.keep_slots)
        return (group.keep_slots - untouched) / (group.capacity - untouched)

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
            {cluster_text(self, model)}
            length_out = Identity (clustered_length)
            """,
            outputs=("length_out",),
        )

    def reference(self, program: str) -> Callable[..., State]:
        return {COMPRESS: self._compress}[program]

    def _compress(
        self, model: ModelFacts, state: State, *, target: Tensor, sinks: int, recent: Tensor, thresholds: list[float]
    ) -> State:
        method = self.resolve(model)
        clustered, level = cluster_state(method, model, state, target, sinks, recent, thresholds)
        after, evicted = evict_oldest(clustered, target, sinks)
        return {**after, "level": level, "evicted": evicted}

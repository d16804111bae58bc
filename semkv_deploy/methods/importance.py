"""Selection by importance: of each KV head those keys stay that are looked at most when a context is read again.

The largest attention that a repetition of the context gives a key tells best what may go while the question is not
known yet (KVzip, arXiv 2505.23416). With `queries=repeat` a session measures it: what was appended is read once more
before a compression, which costs a second prefill, and nothing in between. A slot's score lies in the buffer
`slot_attention` and stays with it, so that no token is read more than twice. With `queries=predicted` it is predicted
from key and value (`importance_prediction`), on every target and at no cost.

With `fit` the slots that stay are then changed to give the queries of that reading the attention that the whole cache
gave them (`attention_matching`).

Sinks and a recent window always stay. The method is at its best with capacities of their own for each KV head or layer,
so `build` gives it those. What is "auto" is what `semkv-deploy evaluate` says is best where it can be had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from semkv_deploy.methods import rotation, text
from semkv_deploy.methods.attention_matching import QUERIES, REFERENCE_QUERIES, fit_slots, fitted, native_fitted
from semkv_deploy.methods.base import BiasMode, State
from semkv_deploy.methods.behaviours import ReadAgain
from semkv_deploy.methods.importance_prediction import (
    LEAST_ATTENTION,
    ScoreWeights,
    feature_count,
    fit_predictor,
    slot_features,
)
from semkv_deploy.methods.isolated_turns import IsolatesTurns
from semkv_deploy.methods.layout import COMPRESS, DECODE
from semkv_deploy.methods.merging import function_proto, merge_dropped, merged
from semkv_deploy.methods.selection import KEEP_HIGHEST, keep_highest
from semkv_deploy.methods.slot_attention import RECORD, with_slot_attention
from semkv_deploy.ops import compact_cache

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import Tensor
    from typing_extensions import Self

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.choices import BudgetBy
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import CalibrationText, Settings
    from semkv_deploy.methods.layout import CacheLayout
    from semkv_deploy.model.cache_groups import CacheGroup
    from semkv_deploy.model.config import ModelFacts

Fit = Literal["none", "merge", "bias", "all"]

_BUFFERS = ("slot_attention", "reference_queries")
"""What is kept of a group beside its slots; a compressor takes and returns it."""

_PREDICTED_SCORE = """
    channel_axis = Constant <value = int64[1] {{3}}> ()
    {before}
    value_float = Cast <to = 1> (value_cache)
    table_shape = Constant <value = int64[4] {{1, {heads}, {columns}, 1}}> ()
    table = Reshape (weights, table_shape)
    table_parts = Constant <value = int64[5] {{{dim}, {dim}, {dim}, {dim}, 1}}> ()
    of_key, of_value, of_key_square, of_value_square, constant = Split <axis = 2> (table, table_parts)
    key_part = MatMul (key_back, of_key)
    value_part = MatMul (value_float, of_value)
    key_square = Mul (key_back, key_back)
    key_square_part = MatMul (key_square, of_key_square)
    value_square = Mul (value_float, value_float)
    value_square_part = MatMul (value_square, of_value_square)
    score_column = Sum (key_part, value_part, key_square_part, value_square_part, constant)
    score = Squeeze (score_column, channel_axis)
"""

_RECORDED_SCORE = f"""
    least = Constant <value = float {{{LEAST_ATTENTION:.8f}}}> ()
    attention = Max (slot_attention, least)
    log_attention = Log (attention)
    score = Mul (log_attention, scored)
"""

_CHOSEN = """
    key_cache_out, value_chosen, bias_chosen, length_out =
        semkv.CompactCache (key_cache, value_cache, slot_bias, keep_index)
"""

_UNCHANGED = """
    value_cache_out = Identity (value_chosen)
    slot_bias_out = Identity (bias_chosen)
"""

_MOVE_ATTENTION = """
    attention_from = Max (keep_index, zero)
    attention_none = Less (keep_index, zero)
    attention_moved = GatherElements <axis = 2> (slot_attention, attention_from)
    no_attention = Constant <value = float {0.0}> ()
    slot_attention_out = Where (attention_none, no_attention, attention_moved)
"""


class Importance(IsolatesTurns):
    """Keeps the slots of the highest importance, each KV head its own.

    Attributes:
        queries: whose attention counts: "repeat", the context's own when it is read again; "predicted", what a
            regression on keys and values says of it; "auto": repeat, where decoders of every target can record it.
        recent: share of the target that is a recent window, 32 slots at least, kept whatever its score. While a text is
            read in a small cache, tokens need what stands just before them.
        fit: how the slots that stay stand for those that go: "none", not at all; "merge", what goes is merged into the
            slot most like it; "bias" and "all": biases, or biases and values too, are fitted to the queries of the
            second reading; "auto": all, where there is such a reading and logits are not capped; merge where the
            second reading is predicted.
    """

    kind: Literal["importance"] = "importance"
    queries: Literal["auto", "repeat", "predicted"] = "auto"
    recent: float = Field(default=0.5, ge=0, lt=1)
    fit: Literal["auto"] | Fit = "auto"

    @model_validator(mode="after")
    def _fit_needs_queries(self) -> Self:
        if self.fit in ("bias", "all") and self.queries == "predicted":
            raise ValueError(f"fit={self.fit} needs queries=repeat: it fits to the queries of a second reading")
        return self

    def for_build(self, *, records: bool, capped: bool = False) -> Self:
        # What is to be fitted says by itself that there are queries to fit to.
        asked = self.queries == "repeat" or self.fit in ("bias", "all")
        chosen = self.model_copy(
            update={"queries": "repeat" if self.reads_again and (records or asked) else "predicted"}
        )
        if self.fit != "auto":
            return chosen
        if chosen.reads_again:
            return chosen.model_copy(update={"fit": "none" if capped else "all"})
        return chosen.model_copy(update={"fit": "merge"})

    @property
    def budget_by(self) -> BudgetBy:
        # A group of its own for every head is an attention of its own in the decoder, and predictions go with targets
        # on which nobody has measured what that costs.
        return "head" if self.reads_again else "layer"

    @property
    def fits(self) -> Fit:
        """`fit`; of a method that no build has resolved: all where it reads again, else none, which all targets can."""
        if self.fit != "auto":
            return self.fit
        return "all" if self.reads_again else "none"

    @property
    def bias_mode(self) -> BiasMode:
        return "none" if self.fits == "none" else "head"

    @property
    def fitted_queries(self) -> int:
        return QUERIES if self.fits in ("bias", "all") else 0

    @property
    def merges_dropped(self) -> bool:
        return self.fits == "merge"

    @property
    def scores(self) -> bool:
        return not self.reads_again

    @property
    def reads_again(self) -> bool:
        return self.queries != "predicted"

    @property
    def clusters_by_head(self) -> bool:
        return True

    # What a method that scores slots likewise may do with the scores before the highest are kept.

    @property
    def pool_text(self) -> str:
        """ONNX text that redefines `score` `[B,H,C]`, as `pooled`, from it and from the state."""
        return "pooled = Identity (score)"

    def pool_scores(self, score: Tensor, state: State) -> Tensor:
        """What `pool_text` computes."""
        return score

    @property
    def recent_share(self) -> float:
        return self.recent

    @property
    def recent_least(self) -> int:
        return 32

    def layout(self, model: ModelFacts, groups: Sequence[CacheGroup]) -> CacheLayout:
        layout = super().layout(model, groups)
        if not self.reads_again:
            return layout
        return with_slot_attention(layout, *([REFERENCE_QUERIES] if self.fitted_queries else []))

    def rewrite_decoder(self, decoder: ir.Model, layout: CacheLayout) -> None:
        if self.reads_again:
            from semkv_deploy.methods.record_attention import record_attention

            record_attention(decoder, self.fitted_queries)

    def compressor(self, model: ModelFacts) -> onnx.ModelProto:
        standing = _UNCHANGED
        if self.fits == "merge":
            standing = merged(self.isolates)
        elif self.fits != "none":
            standing = fitted(self.fits == "all", self.isolates)
        return self._compressor(model, _CHOSEN + standing)

    def native_compressor(self, model: ModelFacts) -> onnx.ModelProto:
        # The native form fits every slot that stays.
        if not self.fitted_queries or self.isolates:
            return self.compressor(model)
        return self._compressor(model, native_fitted(self.fits == "all"))

    def _compressor(self, model: ModelFacts, moved_slots: str) -> onnx.ModelProto:
        """The graph around the text that moves the slots of `keep_index` and makes them stand for the others."""
        heads, features = model.kv_heads, feature_count(model)
        if self.reads_again:
            more = {"slot_attention": f"float[batch,{heads},capacity]", "scored": "float"}
            if self.fitted_queries:
                more["reference_queries"] = f"float[batch,{heads},{QUERIES},{model.head_dim}]"
            score, moved = _RECORDED_SCORE, _MOVE_ATTENTION
        else:
            more = {"weights": f"float[{heads * (features + 1)}]"}
            more |= {"scored": "float"} if self.merges_dropped else {}
            before = "key_back = Cast <to = 1> (key_cache)"
            if rotation.can_unrotate(model):
                before = rotation.UNROTATE.format(**rotation.parameters(model))
            score = _PREDICTED_SCORE.format(before=before, heads=heads, columns=features + 1, dim=model.head_dim)
            moved = ""
        own_inputs = tuple(more)
        more |= dict.fromkeys(self.more_columns, f"int64[batch,{heads},capacity]")
        moved += "".join(text.move_column(name) for name in self.more_columns)
        outputs = [*(name for name in own_inputs if name in _BUFFERS), *self.more_columns]
        return text.parse_compressor(
            model,
            cluster_groups=heads,
            inputs=(*own_inputs, *self.more_columns, "target", "sinks", "recent"),
            operators=("CompactCache",),
            more=more,
            outputs=(*text.COMPRESSED, *(f"{name}_out" for name in outputs)),
            functions=[function_proto()] if self.merges_dropped else [],
            body=f"""
            {text.SLOTS}
            {score}
            {self.pool_text}
            {KEEP_HIGHEST}
            {moved_slots}
            final_index = Identity (keep_index)
            {text.MOVE_METADATA}
            {moved}
            level = Where (over, zero, minus_one)
            """,
        )

    def calibrate(self, model: ModelFacts, text: CalibrationText) -> Settings | None:
        return None if self.reads_again else fit_predictor(model, text, self.sinks)

    def group_inputs(
        self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None
    ) -> dict[str, tuple[Any, ...]]:
        """Adds each group's weights, or whether its attention counts.

        Without a score (in a layer with a sliding window, or uncalibrated) all slots are equal, and the newest stay.
        """
        given = super().group_inputs(model, profile, settings)
        windowed = [bool(model.windows[group.layer]) for group in profile.groups]
        if self.reads_again or self.merges_dropped:
            given = {**given, "scored": tuple(0.0 if window else 1.0 for window in windowed)}
        if self.reads_again:
            return given
        weights = []
        for number, group in enumerate(profile.groups):
            if isinstance(settings, ScoreWeights) and not windowed[number]:
                weights.append(settings.weights[number])
            else:
                weights.append((0.0,) * (len(group.heads) * (feature_count(model) + 1)))
        return {**given, "weights": tuple(weights)}

    def behaviours(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[Behaviour]:
        behaviours = super().behaviours(model, profile, settings)
        if behaviours and self.reads_again:
            again = ReadAgain(
                program=DECODE,
                input=RECORD.name,
                when=self.compress_at,
                piece=profile.prefill_chunk,
            )
            return [again, *behaviours]
        return behaviours

    def reference(self, program: str) -> Callable[..., State]:
        return {COMPRESS: functools.partial(_compress, self)}[program]


def _compress(
    method: Importance,
    model: ModelFacts,
    state: State,
    *,
    target: Tensor,
    sinks: int,
    recent: Tensor,
    weights: Tensor | None = None,
    scored: float = 1.0,
    **_: Any,
) -> State:
    import torch

    score = _recorded(state, scored) if weights is None else _predicted(model, state, weights)
    keep = keep_highest(method.pool_scores(score, state), state["length"], target, sinks, recent)
    key, value, bias, length = compact_cache.reference(
        state["key_cache"], state["value_cache"], state["slot_bias"], keep
    )
    moved: State = {
        name: state[name].gather(2, keep.clamp_min(0)).masked_fill(keep < 0, 0)
        for name in ("slot_position", "slot_chunk", "slot_attention", *method.more_columns)
        if name in state
    }
    excess = state["length"] - target
    after: State = {"key_cache": key, "value_cache": value, "slot_bias": bias, "length": length, **moved}
    frozen = sinks if method.isolates else 0
    if method.merges_dropped and scored:
        merge_dropped(state, after, keep, score, frozen)
    if method.fitted_queries:
        fit_slots(state, after, (excess > 0) & bool(scored), method.fits == "all", frozen)
        used_up = (excess > 0)[:, None, None, None] | (not method.isolates)
        after["reference_queries"] = state["reference_queries"].masked_fill(used_up, 0)
    return {**after, "level": torch.where(excess > 0, 0, -1), "evicted": excess.clamp_min(0)}


def _recorded(state: State, scored: float) -> Tensor:
    """The log of the attention that was recorded, `[B,H,C]`."""
    return state["slot_attention"].clamp_min(LEAST_ATTENTION).log() * scored


def _predicted(model: ModelFacts, state: State, weights: Tensor) -> Tensor:
    """The log of the attention that is predicted, `[B,H,C]`."""
    import torch

    batch, heads = state["slot_chunk"].shape[:2]
    factor, constant = weights.reshape(heads, -1).split([feature_count(model), 1], -1)
    score = torch.empty(state["slot_chunk"].shape)
    for b in range(batch):
        for h in range(heads):
            key, value = (state[name][b, h].float() for name in ("key_cache", "value_cache"))
            score[b, h] = slot_features(model, key, value, state["slot_position"][b, h]) @ factor[h] + constant[h]
    return score

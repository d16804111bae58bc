"""SemantiCache's clustering, as graph text and as slow PyTorch: what surrounds `SemanticCluster`.

The operator compares keys and averages keys and values. Everything else that the method varies happens around it: which
slots count as one chunk, in which frame keys are compared, and whether a core has its members' mean key or its seed's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from semkv_deploy.methods import rotation
from semkv_deploy.ops import semantic_cluster

if TYPE_CHECKING:
    from torch import Tensor

    from semkv_deploy.methods.base import State
    from semkv_deploy.methods.semanticache import SemantiCache
    from semkv_deploy.model.config import ModelFacts, Rotary

_CHUNKS = """
            level_axis = Constant <value = int64[1] {2}> ()
            channel_axis = Constant <value = int64[1] {3}> ()
            before_window_column = Unsqueeze (before_window, axis_1)
            in_window = GreaterOrEqual (slot, before_window_column)
            in_sinks = Less (slot, sinks)
            pinned_row = Or (in_window, in_sinks)
            pinned = Unsqueeze (pinned_row, axis_1)
            delimiter_bit = Mod (slot_chunk, two)
            is_delimiter = Equal (delimiter_bit, one)
            chunk_number = Div (slot_chunk, two)
            chunk_width = Constant <value = int64 {WIDTH}> ()
            wide_chunk = Div (chunk_number, chunk_width)
"""

_DELIMITERS = {
    "keep": """
            untouched = Or (pinned, is_delimiter)
            own_chunk = Identity (wide_chunk)
    """,
    "apart": """
            untouched = Identity (pinned)
            wide_chunk_pair = Mul (wide_chunk, two)
            own_chunk = Add (wide_chunk_pair, delimiter_bit)
    """,
    "merge": """
            untouched = Identity (pinned)
            own_chunk = Identity (wide_chunk)
    """,
}

_ALL_LEVELS = """
            slot_chunk_id = Where (untouched, minus_one, own_chunk)
            one_level = Unsqueeze (slot_chunk_id, level_axis)
            level_count = Shape (thresholds)
            batch_and_groups = Constant <value = int64[2] {1, 1}> ()
            one_slot = Constant <value = int64[1] {1}> ()
            all_levels = Concat <axis = 0> (batch_and_groups, level_count, one_slot)
            chunk_id = Expand (one_level, all_levels)
"""

# Dead slots may hold anything finite, so they are left out of the sum.
_CENTER = """
            length_column = Unsqueeze (length, axis_1)
            is_live_row = Less (slot, length_column)
            head_and_channel = Constant <value = int64[2] {1, 3}> ()
            is_live = Unsqueeze (is_live_row, head_and_channel)
            none_f = Constant <value = float {0.0}> ()
            mergeable_f = Cast <to = 1> (mergeable)
            live_f = Where (is_live, mergeable_f, none_f)
            live_sum = ReduceSum (live_f, level_axis)
            live_some = Max (length, one)
            live_count = Cast <to = 1> (live_some)
            not_batch = Constant <value = int64[3] {1, 2, 3}> ()
            live_count_column = Unsqueeze (live_count, not_batch)
            common_key = Div (live_sum, live_count_column)
            compared_f = Sub (mergeable_f, common_key)
            compared = CastLike (compared_f, key_cache)
"""

_BACK_FROM_CENTER = """
            merged_apart_f = Cast <to = 1> (merged_apart)
            merged_f = Add (merged_apart_f, common_key)
            merged_key = CastLike (merged_f, key_cache)
"""

_SEED = """
            seed_index = Max (source_slot, zero)
            bias_shape = Shape (slot_bias)
            seed_in_head = Expand (seed_index, bias_shape)
            seed_rows = Unsqueeze (seed_in_head, channel_axis)
            key_seed = GatherND <batch_dims = 2> (key_cache, seed_rows)
"""

# What merged with nothing keeps its key bit for bit.
_UNMERGED = """
            seed_bias = GatherElements <axis = 2> (slot_bias, seed_in_head)
            unmerged = Equal (seed_bias, clustered_bias)
            unmerged_column = Unsqueeze (unmerged, channel_axis)
            clustered_key = Where (unmerged_column, key_seed, key_mean)
"""


def cluster_text(method: SemantiCache, model: ModelFacts) -> str:
    """Text from a group's state, `sinks`, `before_window`, `thresholds` and `target` to the clustered layer.

    It defines `clustered_key`, `clustered_value`, `clustered_bias`, `clustered_length`, `source_slot` and `level`.
    """
    unrotated = method.unrotates
    return "".join(
        (
            _CHUNKS.replace("WIDTH", str(method.neighbours)),
            _DELIMITERS[method.delimiters],
            _ALL_LEVELS,
            rotation.UNROTATE.format(**rotation.parameters(model)) if unrotated else "mergeable = Identity (key_cache)",
            _CENTER if method.center else "\ncompared = Identity (mergeable)",
            f"""
            merged_apart, clustered_value, clustered_bias, clustered_length, source_slot, level =
                semkv.SemanticCluster <span: int = {method.span}> (
                    compared, value_cache, slot_bias, length, chunk_id, thresholds, target)
            """,
            _keys(method, unrotated),
        )
    )


def native_cluster_text(method: SemantiCache, model: ModelFacts) -> str:
    """What `cluster_text` defines, by the form of the operator that takes keys as positions rotated them.

    A method that centers keys has none: what they have in common is taken from them before they are compared.
    """
    form, more, frequency = "SemanticCluster", "", ""
    if method.unrotates:
        form, more = "SemanticCluster_unrotated", ", slot_position, frequency"
        frequency = "frequency = Constant <value = float[{half}] {{{frequencies}}}> ()"
    return "".join(
        (
            _CHUNKS.replace("WIDTH", str(method.neighbours)),
            _DELIMITERS[method.delimiters],
            _ALL_LEVELS,
            frequency and frequency.format(**rotation.parameters(model)),
            f"""
            clustered_key, clustered_value, clustered_bias, clustered_length, source_slot, level =
                semkv.{form} <span: int = {method.span}, seed_keys: int = {int(method.merge == "values")}> (
                    key_cache, value_cache, slot_bias, length, chunk_id, thresholds, target{more})
            """,
        )
    )


def _keys(method: SemantiCache, unrotated: bool) -> str:
    if method.merge == "values":
        return f"{_SEED} clustered_key = Identity (key_seed)"
    if not unrotated and not method.center:
        return "clustered_key = Identity (merged_apart)"
    return "".join(
        (
            _BACK_FROM_CENTER if method.center else "merged_key = Identity (merged_apart)",
            _SEED,
            rotation.ROTATE_BACK if unrotated else "key_mean = Identity (merged_key)",
            _UNMERGED,
        )
    )


def cluster_state(
    method: SemantiCache,
    model: ModelFacts,
    state: State,
    target: Tensor,
    sinks: int,
    recent: Tensor,
    thresholds: list[float],
) -> tuple[State, Tensor]:
    """What the text computes, one slot at a time: the clustered state, and the level `[B]` that was taken."""
    import torch

    batch, groups, capacity = state["slot_chunk"].shape
    chunk_id = torch.full((batch, groups, len(thresholds), capacity), -1)
    for b in range(batch):
        for g in range(groups):
            # Sinks and window stay as they are; so do slots past the length, which are dead.
            for slot in range(sinks, int(state["length"][b] - recent[b])):
                chunk, delimiter = divmod(int(state["slot_chunk"][b, g, slot]), 2)
                wide = chunk // method.neighbours
                chunk_of = {"keep": -1 if delimiter else wide, "apart": 2 * wide + delimiter, "merge": wide}
                chunk_id[b, g, :, slot] = chunk_of[method.delimiters]
    unrotated = method.merge_keys == "unrotated"
    keys = state["key_cache"]
    compared = _rotary(model).rotate(keys, -state["slot_position"]) if unrotated else keys
    common = torch.zeros_like(compared[:, :, :1])
    if method.center:
        for b, live in enumerate(state["length"].tolist()):
            common[b] = compared[b, :, :live].sum(1, keepdim=True) / max(live, 1)
    key, value, bias, length, source, level_taken = semantic_cluster.reference(
        compared - common,
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
    if unrotated or method.center or method.merge == "values":
        mean = key + common
        key = _rotary(model).rotate(mean, position) if unrotated else mean
        for b, h, slot in torch.cartesian_prod(*(torch.arange(size) for size in bias.shape)).tolist():
            origin = int(seed[b, h if groups > 1 else 0, slot])
            if method.merge == "values" or bias[b, h, slot] == state["slot_bias"][b, h, origin]:
                # Merged with nothing: the very bits it came from.
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

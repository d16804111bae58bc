"""Un-rotating cached keys before they are merged, and rotating cores to their seed's position, in ONNX text.

A cached key is R(p) k with R the model's rotary embedding. Averaging R(p) k and R(p+d) k damps every pair of channels
by |cos(theta d / 2)|; averaging the un-rotated keys does not. Rotation by halves (the Hugging Face convention), over
the first `rotary dimension` channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.model.config import ModelFacts

UNROTATE = """
    frequency = Constant <value = float[{half}] {{{frequencies}}}> ()
    channel_parts = Constant <value = int64[3] {{{half}, {half}, {rest}}}> ()
    position_float = Cast <to = 1> (slot_position)
    position_column = Unsqueeze (position_float, channel_axis)
    angle = Mul (position_column, frequency)
    cos_before = Cos (angle)
    sin_before = Sin (angle)
    key_float = Cast <to = 1> (key_cache)
    first, second, unrotary = Split <axis = 3> (key_float, channel_parts)
    first_cos = Mul (first, cos_before)
    second_sin = Mul (second, sin_before)
    first_back = Add (first_cos, second_sin)
    second_cos = Mul (second, cos_before)
    first_sin = Mul (first, sin_before)
    second_back = Sub (second_cos, first_sin)
    key_back = Concat <axis = 3> (first_back, second_back, unrotary)
    mergeable = CastLike (key_back, key_cache)
"""
"""`mergeable` from `key_cache`, `slot_position` `[B,G,C]`, with `channel_axis` `[1]`."""

ROTATE_BACK = """
    seed_position = GatherElements <axis = 2> (slot_position, seed_index)
    seed_float = Cast <to = 1> (seed_position)
    seed_column = Unsqueeze (seed_float, channel_axis)
    seed_angle = Mul (seed_column, frequency)
    seed_cos = Cos (seed_angle)
    seed_sin = Sin (seed_angle)
    merged_float = Cast <to = 1> (merged_key)
    merged_first, merged_second, merged_rest = Split <axis = 3> (merged_float, channel_parts)
    merged_first_cos = Mul (merged_first, seed_cos)
    merged_second_sin = Mul (merged_second, seed_sin)
    first_forth = Sub (merged_first_cos, merged_second_sin)
    merged_second_cos = Mul (merged_second, seed_cos)
    merged_first_sin = Mul (merged_first, seed_sin)
    second_forth = Add (merged_second_cos, merged_first_sin)
    key_forth = Concat <axis = 3> (first_forth, second_forth, merged_rest)
    key_mean = CastLike (key_forth, key_cache)
"""
"""`key_mean`: cores, from `merged_key`, rotated to the position of their seeds, `seed_index` `[B,G,C]`."""


def can_unrotate(facts: ModelFacts) -> bool:
    """Whether the model has one table of rotary frequencies, over channel halves."""
    return facts.rotary is not None and not facts.rotary.interleaved


def parameters(facts: ModelFacts) -> dict[str, object]:
    """Values for the braces of `UNROTATE`.

    Raises:
        SemkvError: when the model has no single table of rotary frequencies to undo.
    """
    rotary = facts.rotary
    if rotary is None or not can_unrotate(facts):
        raise SemkvError(
            "keys cannot be un-rotated: the model has no single rotary table over channel halves",
            where=f"{facts.family}, merge_keys=unrotated",
            fix="use merge_keys=cached",
        )
    half = len(rotary.inv_freq)
    return {
        "half": half,
        "rest": facts.head_dim - 2 * half,
        "frequencies": ", ".join(f"{frequency:.9g}" for frequency in rotary.inv_freq),
    }

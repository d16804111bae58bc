"""Names of a decoder's inputs and outputs: stated once, for exporters, lowerings, contracts and engines.

Buffers are numbered by cache group. With one group a layer, the default, a group's number is its layer's.
"""

from __future__ import annotations

INPUT_IDS, POSITION_IDS, LOGITS_INDEX, LENGTH = "input_ids", "position_ids", "logits_index", "length"

STEP_INPUTS = (INPUT_IDS, POSITION_IDS, LOGITS_INDEX, LENGTH)
"""Names of the decoder's inputs that are not buffers, in order."""

LOGITS = "logits"

TAG = "{group}"
"""What stands for a group's number in a pattern."""

DECODER_INPUT = {
    "key": "past_key_values.{group}.key",
    "value": "past_key_values.{group}.value",
    "key_scale": "past_key_values.{group}.scale_of_key",
    "value_scale": "past_key_values.{group}.scale_of_value",
}
"""Patterns of a buffer's decoder input; a buffer that is not here has the pattern `<buffer>.{group}`."""

FOLDED_ROWS = "cache_rows_"
"""Begins the symbol of a first axis that has a group's KV heads in it, batch x heads; their number follows."""

SLOT_ATTENTION = "slot_attention"
"""What a decoder that records attention raises: `slot_attention.NN` in, `slot_attention_out.NN` out."""

REFERENCE_QUERIES = "reference_queries"
"""Where it writes queries down: `reference_queries.NN` in, `reference_queries_out.NN` out."""

DECODER_OUTPUT = {
    **{name: pattern.replace("past_key_values.", "present.") for name, pattern in DECODER_INPUT.items()},
    **{name: f"{name}_out.{TAG}" for name in (SLOT_ATTENTION, REFERENCE_QUERIES)},
}
"""Patterns of a buffer's decoder output; buffers that are not here are only read."""

SLOT_BIAS = "slot_bias"


def number_tag(number: int, count: int) -> str:
    """The digits of one number of `count`: as many as the last one has, two at least.

    Equally wide, so that no name is a prefix of another, which servers that match state by prefix swap.
    """
    return f"{number:0{max(2, len(str(count - 1)))}d}"


def decoder_input(buffer: str, group: int, groups: int) -> str:
    """The name of a buffer's decoder input, for one group of so many."""
    return DECODER_INPUT.get(buffer, f"{buffer}.{TAG}").replace(TAG, number_tag(group, groups))


def decoder_output(buffer: str, group: int, groups: int) -> str:
    """The name of a buffer's decoder output, for one group of so many."""
    return DECODER_OUTPUT[buffer].replace(TAG, number_tag(group, groups))


def cache_names(group: int, groups: int) -> tuple[str, str, str]:
    """Names of the decoder inputs of one group of so many: key, value, slot bias."""
    key, value, bias = (decoder_input(buffer, group, groups) for buffer in ("key", "value", SLOT_BIAS))
    return key, value, bias


def present_names(group: int, groups: int) -> tuple[str, str]:
    """Names of the decoder outputs of one group of so many: key, value."""
    return decoder_output("key", group, groups), decoder_output("value", group, groups)


def is_cache_input(name: str | None) -> bool:
    """Whether a decoder input holds keys or values."""
    return (name or "").startswith("past_key_values.")


def is_cache_output(name: str | None) -> bool:
    """Whether a decoder output holds keys or values."""
    return (name or "").startswith("present.")


def is_slot_bias(name: str | None) -> bool:
    """Whether a decoder input holds slot biases."""
    return (name or "").startswith(f"{SLOT_BIAS}.")


def past_of(output: str) -> str:
    """The cache input that a cache output appends to."""
    return output.replace("present.", "past_key_values.", 1)


def raised_by(output: str) -> str | None:
    """The input that an output of a recorded run goes on from, in the same buffer; None for any other output."""
    name, _, tag = output.rpartition(".")
    known = {f"{buffer}_out": buffer for buffer in (SLOT_ATTENTION, REFERENCE_QUERIES)}
    return f"{known[name]}.{tag}" if name in known else None

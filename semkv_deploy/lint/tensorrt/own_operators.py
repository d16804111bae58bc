"""Rules about what only `TRT_Attention` and `TRT_KVCacheUpdate` have, which no ONNX schema describes.

    TRT_Attention(query, key, value, mask?, query_lengths?, key_value_lengths?)
        <causal_kind = "none" | "upper_left" | "lower_right", TRT_normalization_op = "softmax" | "none",
         query_form, key_value_form = "padded_bhnd" | "packed_nhd", TRT_decomposable>
    TRT_KVCacheUpdate(cache, update, write_indices, update_lengths?) <axis, mode, update_form>

The importer takes them by name, in any domain. Nothing scales the query: that is a node of the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt.view import Placed, Rule, View, argument, at, attribute, number, text

OF_ATTENTION = {
    "is_causal": "set causal_kind",
    "scale": "multiply the query by it",
    "softcap": "write this attention as MatMul, Tanh, Softmax, MatMul",
    "softmax_precision": "leave it out",
}
"""Attributes of the standard operator, and what to do instead."""
PADDED, PACKED = "padded_bhnd", "packed_nhd"


def _attentions(view: View) -> Iterator[Placed]:
    return view.of_type("TRT_Attention", domains=None)


def trt_attention_ignored(view: View) -> Iterator[Finding]:
    """Attributes of the standard operator are accepted and ignored, `scale` and `is_causal` too; so is a 7th input."""
    for node, _ in _attentions(view):
        for name in OF_ATTENTION:
            if number(node, name):
                instead = {"is_causal": "set causal_kind", "scale": "multiply the query by it"}.get(
                    name, "use Attention"
                )
                yield at(node, f"{name} is ignored by TRT_Attention", instead, "wrong")
        if any(argument(node, index) is not None for index in range(6, len(node.input))):
            fix = "lengths of the keys are its 6th input"
            yield at(node, "TRT_Attention ignores inputs after the 6th", fix, "wrong")


def trt_attention_choice(view: View) -> Iterator[Finding]:
    """Refused: "Unsupported causal_kind", "Unsupported normalization op", "Unsupported IO form"."""
    choices = {
        "causal_kind": ("none", "upper_left", "lower_right"),
        "TRT_normalization_op": ("softmax", "none"),
        "query_form": (PADDED, PACKED),
        "key_value_form": (PADDED, PACKED),
    }
    for node, _ in _attentions(view):
        for name, known in choices.items():
            if attribute(node, name) is not None and (value := text(node, name)) not in known:
                yield at(node, f"{name} = {value!r} is not known", f"use {' or '.join(known)}", "blocked")


def trt_attention_rank(view: View) -> Iterator[Finding]:
    """Refused: "Query tensor must be 4D for padded (BHND) form"; `q_num_heads` is for the standard operator."""
    for node, _ in _attentions(view):
        for index, name in enumerate(("query", "keys", "values")):
            shape = view.shape(node, index)
            if not _packed(node, "query") and shape is not None and len(shape) != 4:
                fix = "reshape it to [batch, heads, rows, size]"
                yield at(node, f"{name} of rank {len(shape)} are refused by TRT_Attention", fix, "blocked")


def trt_attention_packed(view: View) -> Iterator[Finding]:
    """Refused: "uses packed (NHD) inputs described by cu_seqlens, for which no fused kernel is available"."""
    for node, _ in _attentions(view):
        if _packed(node, "query") or _packed(node, "key_value"):
            yield at(node, "packed rows have no kernel", "pad them: [batch, heads, rows, size]", "blocked")


def trt_attention_lengths(view: View) -> Iterator[Finding]:
    """Refused unless there is one length of keys a batch row, and of queries one more (they are running sums)."""
    for node, _ in _attentions(view):
        keys = view.shape(node, 1)
        batch = keys[0] if keys is not None and len(keys) == 4 else None
        for index, name, more in ((4, "query_lengths", 1), (5, "key_value_lengths", 0)):
            shape = view.shape(node, index)
            if not isinstance(batch, int) or shape is None:
                continue
            if len(shape) != 1 or (isinstance(shape[0], int) and shape[0] != batch + more):
                what = f"{name} of shape {list(shape)} for a batch of {batch} is refused"
                yield at(node, what, f"give it the shape [{batch + more}]", "blocked")


def trt_update_form(view: View) -> Iterator[Finding]:
    """Refused: "only valid when update form is kPACKED_NHD", "the update lengths tensor must be set", "3D"."""
    for node, _ in view.of_type("TRT_KVCacheUpdate", domains=None):
        packed, update = _packed(node, "update"), view.shape(node, 1)
        has_lengths = argument(node, 3) is not None
        if text(node, "update_form", PADDED) not in (PADDED, PACKED):
            yield at(node, "its update_form is not known", f"use {PADDED} or {PACKED}", "blocked")
        elif packed != has_lengths:
            what = "a packed update needs update_lengths" if packed else "update_lengths are for packed updates only"
            yield at(node, what, f'set update_form = "{PACKED}" and the 4th input, or neither', "blocked")
        elif update is not None and len(update) != (3 if packed else 4):
            what = f"{'a packed' if packed else 'a padded'} update of rank {len(update)} is refused"
            yield at(node, what, "use [rows, heads, size] or [batch, heads, rows, size]", "blocked")


def _packed(node: onnx.NodeProto, part: str) -> bool:
    return text(node, f"{part}_form", PADDED) == PACKED


RULES: list[Rule] = [
    trt_attention_ignored,
    trt_attention_choice,
    trt_attention_rank,
    trt_attention_packed,
    trt_attention_lengths,
    trt_update_form,
]

"""Rules about attention: what the importer ignores, what it refuses, and which shapes have no kernel.

They are about `Attention` and, but for what only that one has, about TensorRT's own `TRT_Attention` too.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt.cache_walk import from_cache, through_identity
from semkv_deploy.lint.tensorrt.view import Placed, Rule, View, argument, at, attribute, number, text

Dim = int | str | None
FLOAT, FLOAT16, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
BOOL, DOUBLE = onnx.TensorProto.BOOL, onnx.TensorProto.DOUBLE
INTO_MASK = "put it into a float mask"
DECOMPOSE = "give the node TRT_decomposable = 1 (works unfused)"


def _standard(view: View) -> Iterator[Placed]:
    return view.of_type("Attention")


def causal_kind(node: onnx.NodeProto) -> str:
    """ "none", "upper_left" or "lower_right"; `is_causal` of the standard operator is the second."""
    if node.op_type == "TRT_Attention":
        return text(node, "causal_kind", "none")
    return "upper_left" if number(node, "is_causal") else "none"


def attention_length(view: View) -> Iterator[Finding]:
    """`nonpad_kv_seqlen` is accepted and ignored (the one trace: a warning "Unused Input"); padding is attended to."""
    for node, _ in _standard(view):
        if argument(node, 6) is not None:
            yield at(node, "nonpad_kv_seqlen is ignored: padding is attended to", INTO_MASK, "wrong")


def attention_window(view: View) -> Iterator[Finding]:
    """Windows of opset 25 are accepted and ignored without a warning; -1 means none."""
    for node, _ in view.attentions:
        for name in ("left_window_size", "right_window_size"):
            if (size := int(number(node, name, -1))) >= 0:
                yield at(node, f"{name} = {size} is ignored: all slots are attended to", INTO_MASK, "wrong")


def attention_causal_cache(view: View) -> Iterator[Finding]:
    """`is_causal` counts from the first slot (upper left): with a past, row 0 sees slot 0 only."""
    for node, _ in view.attentions:
        if causal_kind(node) == "upper_left" and from_cache(view, argument(node, 1)):
            name = "causal_kind = upper_left" if node.op_type == "TRT_Attention" else "is_causal"
            what = f"{name} counts from the first slot, but its keys are a cache: rows see the wrong slots"
            yield at(node, what, f"{INTO_MASK}, made from the length", "wrong")


def attention_outputs(view: View) -> Iterator[Finding]:
    """Refused: "TensorRT only supports Attention nodes with one output"."""
    for node, _ in view.attentions:
        if len(node.output) > 1:
            fix = "append with TensorScatter and attend to its result"
            yield at(node, f"{len(node.output)} outputs: only one is taken", fix, "blocked")


def attention_past(view: View) -> Iterator[Finding]:
    """Refused: "Setting past_key for the Attention node is not supported"."""
    for node, _ in _standard(view):
        if argument(node, 4) is not None or argument(node, 5) is not None:
            fix = "append with TensorScatter and attend to its result"
            yield at(node, "past_key and past_value are refused", fix, "blocked")


def attention_softcap(view: View) -> Iterator[Finding]:
    """Refused: "Setting softcap is not supported"; 0 means none and is taken."""
    for node, _ in _standard(view):
        if (cap := number(node, "softcap")) != 0:
            yield at(
                node,
                f"softcap = {cap:g} is refused",
                "write this attention as MatMul, Tanh, Softmax, MatMul",
                "blocked",
            )


def attention_softmax_precision(view: View) -> Iterator[Finding]:
    """Refused: "Setting softmax precision is not supported", whatever its value."""
    for node, _ in _standard(view):
        if attribute(node, "softmax_precision") is not None:
            yield at(node, "softmax_precision is refused", "leave the attribute out", "blocked")


def attention_mask_and_causal(view: View) -> Iterator[Finding]:
    """Refused: "Option mask cannot be used together with CausalMaskKind other than kNONE"."""
    for node, _ in view.attentions:
        if argument(node, 3) is not None and causal_kind(node) != "none":
            yield at(node, "a mask together with causality is refused", "put causality into the mask", "blocked")


def attention_mask_type(view: View) -> Iterator[Finding]:
    """A float mask has the query's type, or building ends in a type error; integer masks are refused by the importer.

    TensorRT documents three float types for masks; the builder takes only the query's own.
    """
    for node, _ in view.attentions:
        mask, query = view.element(node, 3), view.element(node, 0)
        if mask and query and mask not in (BOOL, query):
            names = [onnx.TensorProto.DataType.Name(element).lower() for element in (mask, query)]
            yield at(node, f"a {names[0]} mask with a {names[1]} query is refused", "cast the mask", "blocked")


def attention_mask_shape(view: View) -> Iterator[Finding]:
    """Refused: "mask must be broadcastable to [batch, query heads, rows, slots]"; ONNX allows fewer slots."""
    for node, _ in view.attentions:
        mask, keys = view.shape(node, 3), view.shape(node, 1)
        if mask and keys and len(keys) in ((4,) if node.op_type == "TRT_Attention" else (3, 4)):
            slots, last = keys[-2], mask[-1]
            if isinstance(slots, int) and isinstance(last, int) and last not in (1, slots):
                yield at(
                    node, f"a mask of {last} slots over {slots} is refused", "pad the mask with its floor", "blocked"
                )


def attention_value_size(view: View) -> Iterator[Finding]:
    """Refused: "Key and Value must have the same shape"."""
    for node, _ in view.attentions:
        keys, values = view.shape(node, 1), view.shape(node, 2)
        if keys and values and len(keys) == len(values) == 4:
            key, value = keys[-1], values[-1]
            if isinstance(key, int) and isinstance(value, int) and key != value:
                what = f"keys of size {key} and values of size {value} are refused"
                yield at(node, what, "pad the smaller with zeros", "blocked")


def attention_shared_keys(view: View) -> Iterator[Finding]:
    """Two Attention nodes on one query or key that is a graph input or an appended cache crash the builder (SIGSEGV).

    Values may be shared, and so may keys that another operator makes. Models that share caches between layers do this.
    """
    seen: dict[tuple[int, str], str] = {}
    for node, _ in _standard(view):
        for index, name in ((0, "query"), (1, "keys")):
            source = through_identity(view, argument(node, index))
            maker = view.producer.get(source or "")
            appended = maker is not None and maker.op_type in ("TensorScatter", "TRT_KVCacheUpdate")
            if source is None or not (appended or source in view.inputs):
                continue
            first = seen.setdefault((index, source), node.name or node.output[0])
            if first != (node.name or node.output[0]):
                fix = "make a second copy with an operator that computes, such as Mul by 1"
                yield at(node, f"it shares its {name} {source} with {first}: the builder crashes", fix, "blocked")


def attention_kernel(view: View) -> Iterator[Finding]:
    """Refused: "Attention operation was not supported by a dedicated kernel", by shape and type; see `kernel_refusal`.

    Symbolic rows or batch: `blocked` when no profile builds, `unverified` when it depends on the profile.
    """
    for node, _ in view.attentions:
        if number(node, "TRT_decomposable") or text(node, "query_form").startswith("packed"):
            continue
        batch, heads, rows, size = _sizes(view, node)
        element = view.element(node, 0)
        if not isinstance(heads, int) or not isinstance(size, int) or not element:
            yield at(node, "its heads or head size are not known", "give them static shapes", "unverified")
            continue
        mask = view.element(node, 3) if argument(node, 3) is not None else None
        masked = argument(node, 3) is not None
        lengths = node.op_type == "TRT_Attention" and argument(node, 5) is not None
        refusals = [
            kernel_refusal(b, heads, r, size, element, masked, mask == BOOL, lengths)
            for b in ([batch] if isinstance(batch, int) else [1, 4])
            for r in ([rows] if isinstance(rows, int) else [1, 2])
        ]
        what = next((refusal for refusal in refusals if refusal), None)
        if what is not None:
            certain = all(refusals)
            depends = "" if certain else " (so, a profile that allows this does not build)"
            yield at(node, f"no kernel for {what}{depends}", DECOMPOSE, "blocked" if certain else "unverified")


def attention_bfloat16(view: View) -> Iterator[Finding]:
    """bfloat16 has no kernel on SM75, whatever the shape."""
    for node, _ in view.attentions:
        if view.element(node, 0) == BFLOAT16 and not number(node, "TRT_decomposable"):
            fix = "leave SM75 out, or use float16"
            yield at(node, "no bfloat16 kernel for compute capability 7.5", fix, "unverified")


def attention_bool_mask(view: View) -> Iterator[Finding]:
    """With several rows a bool mask makes an engine 2.6 times as large as a float one (1.7 MB, 0.67 MB)."""
    for node, _ in view.attentions:
        if view.element(node, 3) == BOOL and _sizes(view, node)[2] != 1:
            fix = "use a float mask: 0 where allowed, a large negative number elsewhere"
            yield at(node, "a bool mask has larger kernels than a float one", fix, "slow")


def kernel_refusal(
    batch: int, heads: int, rows: int, size: int, element: int, masked: bool, bool_mask: bool, lengths: bool = False
) -> str | None:
    """Why TensorRT-RTX 1.7.1 has no kernel for an `Attention`; None: it has one.

    Measured over SM75, 80, 86, 89, 120, 121 (bfloat16: not SM75) and head sizes 1 to 512.

    Args:
        batch, heads, rows, size: of the query.
        element: its `onnx.TensorProto.DataType`.
        masked, bool_mask: whether there is a mask, and of bool.
        lengths: whether a `TRT_Attention` is given lengths of its keys.
    """
    if rows == 1:
        if size % 8 or size > 256:
            return f"one row with heads of {size} (multiples of 8 up to 256)"
        if batch * heads < 4:
            return f"one row with batch times query heads = {batch * heads} (at least 4)"
        return None
    if element in (FLOAT, DOUBLE):
        return "several rows in float32 (float16 or bfloat16)"
    if not 9 <= size <= 256:
        return f"several rows with heads of {size} (9 to 256)"
    if bool_mask and (size % 8 or size < 16):
        return f"several rows with heads of {size} and a bool mask (multiples of 8 from 16)"
    if lengths and not masked and size % 8:
        return f"several rows with heads of {size}, lengths and no mask (multiples of 8)"
    if heads == 1 and masked:
        return "one query head with several rows and a mask"
    if heads * batch == 1:
        return "one query head of batch 1 with several rows"
    return None


def _sizes(view: View, node: onnx.NodeProto) -> tuple[Dim, Dim, Dim, Dim]:
    """Batch, heads, rows and head size of the query, of rank 4 or `[batch, rows, heads * size]`."""
    query = view.shape(node, 0)
    if query is not None and len(query) == 4:
        return query
    heads = 0 if node.op_type == "TRT_Attention" else int(number(node, "q_num_heads"))
    if query is not None and len(query) == 3 and heads > 0:
        return query[0], heads, query[1], query[2] // heads if isinstance(query[2], int) else query[2]
    return None, None, None, None


RULES: list[Rule] = [
    attention_length,
    attention_window,
    attention_causal_cache,
    attention_outputs,
    attention_past,
    attention_softcap,
    attention_softmax_precision,
    attention_mask_and_causal,
    attention_mask_type,
    attention_mask_shape,
    attention_value_size,
    attention_shared_keys,
    attention_kernel,
    attention_bfloat16,
    attention_bool_mask,
]

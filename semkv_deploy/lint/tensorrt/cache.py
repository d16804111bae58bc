"""Rules about appends to a cache in place and about who reads the cache when.

`TensorScatter` and TensorRT's own `TRT_KVCacheUpdate` become the same layer, with the same conditions.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.aliases import appends, check_read_order, colliding_names
from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt.view import Rule, View, argument, at, number, text

CACHE_TYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
READ_TOO_LATE = "read the cache's output instead, or make the append depend on the reader"


def append_mode(view: View) -> Iterator[Finding]:
    """Refused: "Only linear mode is supported for now"."""
    for node, _ in view.appends:
        if (mode := text(node, "mode", "linear")) != "linear":
            what = f'{node.op_type} in mode "{mode}" is refused'
            yield at(node, what, 'use mode "linear" and compute the index modulo the capacity', "blocked")


def append_rank(view: View) -> Iterator[Finding]:
    """Refused: "The past_cache tensor is required to be 4D"."""
    for node, _ in view.appends:
        shape = view.shape(node, 0)
        if shape is not None and len(shape) != 4:
            fix = "reshape outside the graph to [batch, heads, capacity, head size]"
            yield at(node, f"a cache of rank {len(shape)} is refused, only rank 4 is taken", fix, "blocked")


def append_axis(view: View) -> Iterator[Finding]:
    """Refused: "Sequence dimension must be -2"; the axis may be written 2 or -2."""
    for node, _ in view.appends:
        if (axis := int(number(node, "axis", -2))) not in (-2, 2):
            yield at(
                node,
                f"axis {axis} is refused",
                "put the capacity in axis -2: [batch, heads, capacity, size]",
                "blocked",
            )


def append_capacity(view: View) -> Iterator[Finding]:
    """Refused: "The KV cache tensor must have a static sequence length dimension"; the other three may be dynamic."""
    for node, _ in view.appends:
        shape = view.shape(node, 0)
        if shape is not None and len(shape) == 4 and not isinstance(shape[2], int):
            what = f"the capacity is dynamic ({shape[2] or 'unnamed'})"
            yield at(node, what, "give it a number, one engine for each budget", "blocked")


def append_type(view: View) -> Iterator[Finding]:
    """Refused: "must have type Float, Half, or BFloat16": integers, fp8 and bool are refused."""
    for node, _ in view.appends:
        element = view.element(node, 0)
        if element and element not in CACHE_TYPES and element != onnx.TensorProto.DOUBLE:
            name = onnx.TensorProto.DataType.Name(element).lower()
            fix = f"store it as {', '.join(CACHE_TYPES.values())}, or use a plugin"
            yield at(node, f"a cache of {name} is refused", fix, "blocked")


def append_source(view: View) -> Iterator[Finding]:
    """Refused: "The cache tensor must be a network input"; not an Identity of it, nor another append."""
    for node, inside in view.appends:
        cache = argument(node, 0)
        if not inside and cache is not None and cache not in view.inputs:
            maker = view.producer.get(cache)
            what = (
                f"its cache is {f'made by {maker.op_type}' if maker is not None else 'a constant'}, not a graph input"
            )
            fix = "append once, to the graph input itself; gather the rows of chained appends into one"
            yield at(node, what, fix, "blocked")


def append_result(view: View) -> Iterator[Finding]:
    """Refused: "The output tensor must be a network output"."""
    for node, inside in view.appends:
        if not inside and node.output[0] not in view.outputs:
            yield at(node, "its result is not a graph output", "make the appended cache an output", "blocked")


def append_once(view: View) -> Iterator[Finding]:
    """Two appends to one cache: "Input index already mapped to an output_index"."""
    seen: dict[str, str] = {}
    for node, _ in view.appends:
        cache = argument(node, 0)
        if cache in view.inputs and cache is not None:
            if cache in seen:
                fix = "append all rows with one TensorScatter"
                yield at(node, f"{cache} is appended to already by {seen[cache]}", fix, "blocked")
            seen.setdefault(cache, node.name or node.output[0])


def append_in_branch(view: View) -> Iterator[Finding]:
    """Inside If, Loop or Scan: "The cache tensor must be a network input"."""
    for node, inside in view.appends:
        if inside:
            what = f"an append inside {inside[-1]} is refused"
            yield at(node, what, "append outside, to a slot that the branch chooses", "blocked")


def cache_read_order(view: View) -> Iterator[Finding]:
    """A reader of the old cache that is no ancestor of its append: it builds, and reads whatever is there by then."""
    for source, result in _pairs(view):
        try:
            check_read_order(view.graph, {source: result})
        except SemkvError as error:
            yield Finding(source, str(error.what), READ_TOO_LATE, "wrong")


def cache_name_prefix(view: View) -> Iterator[Finding]:
    """Builds; but servers that match state by prefix (Triton, issue 8586 of its server) swap the two."""
    pairs = _pairs(view)
    for first, second in colliding_names(view.graph, dict(pairs)) if pairs else []:
        yield Finding(first, f"this name is a prefix of {second}", "pad numbers with zeros", "wrong")


def cache_copied(view: View) -> Iterator[Finding]:
    """`present.*` made otherwise than by an append in place: the whole cache is written anew every step."""
    for name in sorted(view.outputs):
        past = name.replace("present", "past_key_values", 1)
        if not name.startswith("present") or past not in view.inputs:
            continue
        maker = view.producer.get(name)
        if maker is None or (past, name) not in appends(maker):
            made = f"made by {maker.op_type}" if maker is not None else "its input"
            fix = "use a cache of static capacity and TensorScatter"
            yield Finding(name, f"{made}: the whole cache is copied every step", fix, "slow")


def _pairs(view: View) -> list[tuple[str, str]]:
    """Cache input and output of every append to a graph input."""
    return [pair for node in view.graph.node for pair in appends(node) if pair[0] in view.inputs]


RULES: list[Rule] = [
    append_mode,
    append_rank,
    append_axis,
    append_capacity,
    append_type,
    append_source,
    append_result,
    append_once,
    append_in_branch,
    cache_read_order,
    cache_name_prefix,
    cache_copied,
]

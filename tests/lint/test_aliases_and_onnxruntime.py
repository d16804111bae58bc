from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.parser
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.aliases import alias_map, check_alias_safety
from semkv_deploy.lint.onnxruntime import lint_onnxruntime

CACHE = "float[1,1,8,4]"


Graph = Callable[..., onnx.GraphProto]


@pytest.fixture
def graph(parse_dotted: Callable[[str], onnx.ModelProto]) -> Graph:
    """A graph with one cache from its body; `__` stands for a dot."""
    return lambda body, **names: parse_dotted(_text(body, **names)).graph


def _text(body: str, past: str = "past_key_values__00__key", present: str = "present__00__key") -> str:
    return f"""
        <ir_version: 11, opset_import: ["": 24]>
        g ({CACHE} {past}, float[1,1,1,4] row, int64[1] at) => ({CACHE} {present}, float[1,1,1,1] seen) {{ {body} }}
        """


APPEND = "present__00__key = TensorScatter <axis: int = -2> (past_key_values__00__key, row, at)"


def test_reader_of_the_new_cache_is_safe(graph: Graph):
    safe = graph(f"{APPEND} seen = ReduceMax (present__00__key)")
    aliases = alias_map(safe)
    assert aliases == {"past_key_values.00.key": "present.00.key"}
    check_alias_safety(safe, aliases)


def test_ancestor_that_reads_the_old_cache_is_safe(graph: Graph):
    check_alias_safety(
        graph(
            """
            seen = ReduceMax (past_key_values__00__key)
            scaled = Mul (row, seen)
            present__00__key = TensorScatter <axis: int = -2> (past_key_values__00__key, scaled, at)
            """
        ),
        {"past_key_values.00.key": "present.00.key"},
    )


@pytest.mark.parametrize("first", [True, False])
def test_other_reader_of_the_old_cache_is_refused(graph: Graph, first: bool):
    """Whatever the order of the nodes: a runtime may choose another."""
    reader = "seen = ReduceMax (past_key_values__00__key)"
    unsafe = graph(f"{reader} {APPEND}" if first else f"{APPEND} {reader}")
    with pytest.raises(SemkvError, match=r"past_key_values\.00\.key: ReduceMax .* may read the cache after"):
        check_alias_safety(unsafe, alias_map(unsafe))


VIEWS = {
    "Reshape": "r = Reshape (past_key_values__00__key, all)",
    "Identity": "r = Identity (past_key_values__00__key)",
    "Squeeze": "r = Squeeze (past_key_values__00__key)",
    "Unsqueeze": "r = Unsqueeze (past_key_values__00__key, zero)",
    "Flatten": "r = Flatten (past_key_values__00__key)",
    "Cast": "r = Cast <to: int = 1> (past_key_values__00__key)",
    "Slice": "r = Slice (past_key_values__00__key, zero, one, one)",
    "Transpose": "r = Transpose (past_key_values__00__key)",
    "Expand": "r = Expand (past_key_values__00__key, all)",
    "two of them": "s = Flatten (past_key_values__00__key) r = Identity (s)",
    "If": "r = If (yes) <then_branch: graph = t () => (float y) { y = Identity (past_key_values__00__key) }, "
    "else_branch: graph = e () => (float z) { z = Neg (past_key_values__00__key) }>",
    "Loop": "r = Loop (, yes, past_key_values__00__key) <body: graph = b (int64 j, bool c, float x) => "
    "(bool d, float y) { d = Not (c) y = Identity (x) }>",
}
"""A node that makes r, which may lie in the cache's buffer. The check looks at names only: shapes are anything."""


def view_graph(graph: Graph, view: str, rest: str) -> onnx.GraphProto:
    constants = "zero = Neg (at) one = Neg (at) all = Neg (at) yes = Not (at)"
    feeds = "scaled = Mul (row, r) present__00__key = TensorScatter (past_key_values__00__key, scaled, at)"
    made = graph(f"{constants} {view} {feeds} {rest}")
    for node in made.node:
        for attribute in node.attribute:
            for inner in attribute.g.node:
                inner.input[:] = [name.replace("__", ".") for name in inner.input]
    return made


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_view_read_after_the_append_is_refused(graph: Graph, view: str):
    unsafe = view_graph(graph, view, "seen = ReduceSum (r)")
    with pytest.raises(
        SemkvError, match=r"past_key_values\.00\.key: ReduceSum seen may read the cache through \w+ after"
    ):
        check_alias_safety(unsafe, alias_map(unsafe))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_view_read_before_the_append_is_safe(graph: Graph, view: str):
    safe = view_graph(graph, view, "seen = ReduceSum (present__00__key)")
    check_alias_safety(safe, alias_map(safe))


def test_view_that_is_an_output_is_refused(graph: Graph):
    feeding = graph(f"seen = Identity (past_key_values__00__key) x = Mul (row, seen) {APPEND.replace('row', 'x')}")
    with pytest.raises(SemkvError, match="the output seen may lie in the cache's buffer"):
        check_alias_safety(feeding, alias_map(feeding))


@pytest.mark.parametrize("copy", ["Neg", "ReduceMax", "Cast <to: int = 10>"])
def test_what_computes_is_no_view(graph: Graph, copy: str):
    copied = view_graph(graph, f"r = {copy} (past_key_values__00__key)", "seen = ReduceSum (r)")
    check_alias_safety(copied, alias_map(copied))


def test_length_may_be_read_at_any_time(graph: Graph):
    safe = view_graph(graph, VIEWS["Reshape"], "seen = Shape (r) more = Size (past_key_values__00__key)")
    check_alias_safety(safe, alias_map(safe))


IF = (
    "%s = If (yes) <then_branch: graph = t () => (float y) { y = Neg (row) }, else_branch: graph = e () => (float z) { "
    "z = If (yes) <then_branch: graph = tt () => (float v) { v = Neg (row) }, "
    "else_branch: graph = ee () => (float w) { w = Mul (row, %s) }> }>"
)
"""What it makes, and what the innermost of its branches reads."""


def test_reader_in_a_branch_is_a_reader(graph: Graph):
    """The cache's own name here, which has no dots inside of branches in the text form."""
    cache = {"past": "past_key_values__1", "present": "present__1"}
    append = "present__1 = TensorScatter (past_key_values__1, %s, at)"
    for reads, safe in (("past_key_values__1", False), ("present__1", True), ("row", True)):
        made = graph(f"yes = Not (at) {append % 'row'} {IF % ('seen', reads)}", **cache)
        made.node[-1].attribute[1].g.node[0].attribute[1].g.node[0].input[1] = reads.replace("__", ".")
        if safe:
            check_alias_safety(made, alias_map(made))
        else:
            with pytest.raises(SemkvError, match="If seen may read the cache after"):
                check_alias_safety(made, alias_map(made))
    body = f"yes = Not (at) most = ReduceMax (past_key_values__1) {IF % ('x', 'most')} {append % 'x'} seen = Neg (row)"
    captures_an_ancestor = graph(body, **cache)
    check_alias_safety(captures_an_ancestor, alias_map(captures_an_ancestor))


OPERANDS = {
    "TensorScatter": ("o = TensorScatter (c, d, i)", {("c", "o")}),
    "TRT_KVCacheUpdate": ("o = trt.TRT_KVCacheUpdate (c, d, i)", {("c", "o")}),
    "GroupQueryAttention": (
        "y, o, p = com.microsoft.GroupQueryAttention (q, k, v, c, d, i, t)",
        {("c", "o"), ("d", "p")},
    ),
    "NexusAttention": ("y, o, p = semkv.NexusAttention (q, k, v, c, d, b, i)", {("c", "o"), ("d", "p")}),
    "NexusAttention int8": (
        "y, o, p, e, f = semkv.NexusAttention <int8 = 1> (q, k, v, c, d, b, i, s, t)",
        {("c", "o"), ("d", "p"), ("s", "e"), ("t", "f")},
    ),
}


@pytest.mark.parametrize(("text", "right"), OPERANDS.values(), ids=OPERANDS)
def test_cache_must_be_the_operand_that_is_updated(text: str, right: set[tuple[str, str]]):
    """Every other pair of operand and result is refused: its buffer would be written over."""
    node = onnx.parser.parse_node(text)
    graph = onnx.GraphProto(node=[node])
    for source in node.input:
        for result in node.output:
            if (source, result) in right:
                check_alias_safety(graph, {source: result})
            else:
                with pytest.raises(SemkvError, match="not appended to in place"):
                    check_alias_safety(graph, {source: result})


def test_updater_that_reads_the_cache_twice_is_refused(graph: Graph):
    twice = graph(f"{APPEND.replace('row', 'past_key_values__00__key')} seen = ReduceMax (present__00__key)")
    with pytest.raises(SemkvError, match="reads the cache while it appends to it"):
        check_alias_safety(twice, alias_map(twice))


def test_cache_that_is_not_appended_to_is_refused(graph: Graph):
    copied = graph("present__00__key = Neg (past_key_values__00__key) seen = ReduceMax (present__00__key)")
    with pytest.raises(SemkvError, match=r"not appended to in place .*got Neg"):
        check_alias_safety(copied, alias_map(copied))


def test_present_without_past(graph: Graph):
    with pytest.raises(SemkvError, match=r"without its input .*an input past_key_values\.00\.key"):
        alias_map(graph("present__00__key = Identity (cache) seen = ReduceMax (cache)", past="cache"))


def test_prefix_names_are_refused(graph: Graph):
    body = "present__1 = TensorScatter <axis: int = -2> (past_key_values__1, row, at) seen = ReduceMax (present__1)"
    short = graph(body, past="past_key_values__1", present="present__1")
    with pytest.raises(SemkvError, match="prefix"):
        check_alias_safety(short, {"past_key_values.1": "present.1", "past_key_values.10": "present.1"})


def test_prefix_of_other_state_is_refused(graph: Graph):
    """A bias is state too, though nothing appends to it in place."""
    safe = graph(f"{APPEND} seen = ReduceMax (present__00__key)")
    for name in ("slot_bias.010", "slot_bias.100", "input", "inputs"):
        safe.input.add(name=name)
    check_alias_safety(safe, alias_map(safe))
    safe.input.add(name="slot_bias.10")
    with pytest.raises(SemkvError, match=r"slot_bias\.10: one state name is a prefix of another .*got slot_bias\.100"):
        check_alias_safety(safe, alias_map(safe))


def _model(node: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""
        <ir_version: 11, opset_import: ["": 24, "semkv": 1, "com.microsoft": 1]>
        g (float[1,1,64] q, {CACHE} k, int32[1] n, int32 t) => (float[1,1,64] y) {{ {node} }}
        """
    )


def test_lint_finds_an_operator_that_was_not_lowered():
    (finding,) = lint_onnxruntime(_model("y = semkv.NexusAttention (q, q, q, k, k, q, n)"))
    assert finding.fatal and "was not lowered" in str(finding)


def test_lint_finds_a_window_that_would_be_ignored():
    node = "y = com.microsoft.GroupQueryAttention <causal: int = 0, local_window_size: int = 4> (q, q, q, k, k, n, t)"
    fatal = [finding for finding in lint_onnxruntime(_model(node)) if finding.fatal]
    (found,) = (finding for finding in fatal if finding.rule == "window_without_causality")
    assert "window is ignored" in found.what


def test_lint_finds_a_head_size_without_a_kernel():
    """The cache's heads have four values; the rule's neighbour has eight."""
    node = "y = com.microsoft.GroupQueryAttention (q, q, q, k, k, n, t)"
    model = _model(node)
    (found,) = (finding for finding in lint_onnxruntime(model) if finding.rule == "head_size")
    assert found.fatal and "a head size of 4" in found.what
    for value in model.graph.input:
        if value.name == "k":
            value.type.tensor_type.shape.dim[3].dim_value = 8
    assert not any(finding.rule == "head_size" for finding in lint_onnxruntime(model))

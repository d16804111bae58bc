from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.parser
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.passes.aliases import alias_map, check_alias_safety
from semkv_deploy.passes.lint import lint_onnxruntime

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
    assert len(fatal) == 1 and "window is ignored" in fatal[0].what

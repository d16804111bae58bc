"""For each rule of the TensorRT lint the smallest model that triggers it, and a neighbour that does not."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
import onnx.parser

from semkv_deploy.lint.onnxruntime import Verdict


@dataclass(frozen=True)
class Case:
    """A model in ONNX text.

    Attributes:
        rule: whose model this is.
        verdict: what the rule says; None: nothing.
        body: graph, and functions behind it.
        opset, domains: imported.
        sizes: symbol -> (min, opt, max) of one optimization profile.
        note: tells cases of one rule apart.
        buildable: False where the rule is silent but the builder refuses for lack of something else (a profile, a
            plugin library).
    """

    rule: str
    verdict: Verdict | None
    body: str
    opset: int = 24
    domains: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    note: str = ""
    buildable: bool = True

    @property
    def name(self) -> str:
        return f"{self.rule}-{self.verdict or 'clean'}{'-' + self.note if self.note else ''}"

    def model(self) -> onnx.ModelProto:
        imports = ", ".join(f'"{name}" : 1' for name in self.domains)
        header = f'<ir_version: 10, opset_import: ["" : {self.opset}{", " + imports if imports else ""}]>'
        return onnx.parser.parse_model(f"{header}\n{self.body}")


def append(node: str, cache: str = "float16[1,2,8,64]", new: str = "float16[1,2,1,64]", out: str = "o") -> str:
    return f"g ({cache} c, {new} u, int64[1] i) => ({cache} {out}) {{ {node} }}"


def attend(
    attributes: str = "",
    inputs: str = "q, k, v",
    *,
    query: str = "1,4,1,64",
    keys: str = "1,2,8,64",
    dtype: str = "float16",
    more: str = "",
) -> str:
    given = f"{dtype}[{query}] q, {dtype}[{keys}] k, {dtype}[{keys}] v{', ' + more if more else ''}"
    node = f"Attention{f'<{attributes}>' if attributes else ''}({inputs})"
    return f"g ({given}) => ({dtype}[{query}] o) {{ o = {node} }}"


def loop(body: str, out: str, state: str = "x") -> str:
    return (
        f"n = Constant<value = int64 {{4}}>() t = Constant<value = bool {{1}}>() {out} = Loop(n, t, {state}) "
        f"<body: graph = b (int64 j, bool ci, float[4] s) => (bool co, float[4] so) {{ {body} co = Identity(ci) }}>"
    )


def branch(body: str) -> str:
    return (
        "g (float[4] x, bool b, float[4] k) => (float[4] y) { y = If(b) "
        f"<then_branch: graph = t1 () => (float[4] z) {{ {body} }}, "
        "else_branch: graph = e1 () => (float[4] w) { w = Identity(x) }> }"
    )


SCATTER = "o = TensorScatter<axis=-2>(c, u, i)"
ROWS = {"query": "1,4,32,64", "keys": "1,2,64,64"}
SPAN = {"S": (1, 8, 64)}
TWO = "g (float16[1,4,1,64] q, float16[1,4,1,64] p, float16[1,2,8,64] k, float16[1,2,8,64] l, float16[1,2,8,64] v)"
TWO += " => (float16[1,4,1,64] o, float16[1,4,1,64] r)"
TWICE = '\n<opset_import: ["" : 24], domain: "semkv">\nTwice (x) => (y) { y = Add(x, x) }'
SUB = '\n<opset_import: ["" : 24], domain: "foo">\n%s (a, b) => (c) { c = Sub(a, b) }'
CAUSAL_CACHE = (
    "g (float16[1,2,8,64] c, float16[1,2,4,64] u, int64[1] i, float16[1,4,4,64] q, float16[1,2,8,64] v) "
    "=> (float16[1,2,8,64] o, float16[1,4,4,64] a) { o = TensorScatter(c, u, i) a = Attention%s(q, o, v) }"
)
NAMED = (
    "g (float16[1,2,8,64] %s, float16[1,2,8,64] %s, float16[1,2,1,64] u, int64[1] i) => (float16[1,2,8,64] %s, "
    "float16[1,2,8,64] %s) {{ {2} = TensorScatter({0}, u, i) {3} = TensorScatter({1}, u, i) }}"
)


def two_caches(*names: str) -> str:
    return (NAMED % names).format(*names)


def twice(attributes: str, function: bool = True) -> str:
    return f"g (float[4] x) => (float[4] y) {{ y = semkv.Twice{attributes}(x) }}" + (TWICE if function else "")


def element_wise(call: str, dtype: str = "float", out: str = "") -> str:
    return f"g ({dtype}[4] x, {dtype}[4] z) => ({out or dtype}[4] y) {{ y = {call} }}"


CASES = [
    Case("append_mode", "blocked", append('o = TensorScatter<axis=-2, mode="circular">(c, u, i)')),
    Case("append_mode", None, append('o = TensorScatter<axis=-2, mode="linear">(c, u, i)')),
    Case("append_rank", "blocked", append("o = TensorScatter<axis=1>(c,u,i)", "float16[1,8,64]", "float16[1,1,64]")),
    Case("append_rank", None, append(SCATTER)),
    Case(
        "append_axis", "blocked", append("o = TensorScatter<axis=1>(c,u,i)", "float16[1,8,2,64]", "float16[1,1,2,64]")
    ),
    Case("append_axis", None, append("o = TensorScatter<axis=2>(c,u,i)")),
    Case("append_capacity", "blocked", append(SCATTER, "float16[1,2,C,64]"), sizes={"C": (8, 8, 8)}),
    Case(
        "append_capacity",
        None,
        append(SCATTER, "float16[B,2,8,64]", "float16[B,2,S,64]").replace("int64[1]", "int64[B]"),
        sizes={"B": (1, 2, 4), "S": (1, 2, 4)},
    ),
    *(
        Case("append_type", verdict, append(SCATTER, f"{dtype}[1,2,8,64]", f"{dtype}[1,2,1,64]"), note=dtype)
        for verdict, types in (
            ("blocked", ("int32", "int64", "int8", "bool", "float8e4m3fn")),
            (None, ("float", "float16", "bfloat16")),
        )
        for dtype in types
    ),
    Case("append_source", "blocked", append("n = Neg(c) o = TensorScatter(n, u, i)")),
    Case("append_source", "blocked", append("n = Identity(c) o = TensorScatter(n, u, i)"), note="identity"),
    Case(
        "append_source",
        "blocked",
        append("p = TensorScatter(c,u,i) o = TensorScatter(p,u,i)").replace(" o) {", " o, float16[1,2,8,64] p) {"),
        note="chain",
    ),
    Case("append_source", None, append("n = Neg(u) o = TensorScatter(c, n, i)")),
    Case("append_result", "blocked", append("n = TensorScatter(c, u, i) o = Neg(n)")),
    Case("append_result", None, append(f"{SCATTER} n = Neg(o)").replace(" o) {", " o, float16[1,2,8,64] n) {")),
    Case(
        "append_once",
        "blocked",
        append("n = Neg(u) o = TensorScatter(c, u, i) p = TensorScatter(c, n, i)").replace(
            " o) {", " o, float16[1,2,8,64] p) {"
        ),
    ),
    Case("append_once", None, two_caches("c0", "c1", "o0", "o1")),
    Case(
        "append_in_branch",
        "blocked",
        append(
            "o = If(b) <then_branch: graph = t1 () => (float16[1,2,8,64] a) { a = TensorScatter(c,u,i) }, "
            "else_branch: graph = e1 () => (float16[1,2,8,64] d) { d = Identity(c) }>"
        ).replace("int64[1] i", "int64[1] i, bool b"),
    ),
    Case(
        "append_in_branch",
        None,
        append(
            "n = If(b) <then_branch: graph = t1 () => (float16[1,2,1,64] a) { a = Neg(u) }, "
            "else_branch: graph = e1 () => (float16[1,2,1,64] d) { d = Identity(u) }> o = TensorScatter(c, n, i)"
        ).replace("int64[1] i", "int64[1] i, bool b"),
    ),
    Case(
        "cache_read_order",
        "wrong",
        append(f"{SCATTER} n = ReduceMax(c)").replace(" o) {", " o, float16[1,1,1,1] n) {"),
    ),
    Case(
        "cache_read_order",
        "wrong",
        append(
            f"{SCATTER} n = If(b) <then_branch: graph = t1 () => (float16[1,2,8,64] a) {{ a = Neg(c) }}, "
            "else_branch: graph = e1 () => (float16[1,2,8,64] d) { d = Tanh(c) }>"
        )
        .replace("int64[1] i", "int64[1] i, bool b")
        .replace(" o) {", " o, float16[1,2,8,64] n) {"),
        note="in a branch",
    ),
    Case("cache_read_order", None, append("n = ReduceMax(c) w = Mul(u, n) o = TensorScatter(c, w, i)")),
    Case("cache_name_prefix", "wrong", two_caches("k_1", "k_10", "present_1", "present_10")),
    Case("cache_name_prefix", None, two_caches("k_01", "k_10", "present_01", "present_10")),
    Case(
        "cache_copied",
        "slow",
        "g (float16[1,2,8,64] past_key_values_00, float16[1,2,1,64] u) => (float16[1,2,9,64] present_00) "
        "{ present_00 = Concat<axis=2>(past_key_values_00, u) }",
    ),
    Case(
        "cache_copied",
        None,
        append(SCATTER)
        .replace(" c,", " past_key_values_00,")
        .replace("(c,", "(past_key_values_00,")
        .replace(" o)", " present_00)")
        .replace("o =", "present_00 ="),
    ),
    Case("attention_length", "wrong", attend(inputs="q, k, v,,,, n", more="int64[1] n")),
    Case("attention_length", None, attend()),
    Case("attention_window", "wrong", attend("left_window_size=2"), 25, note="left"),
    Case("attention_window", "wrong", attend("right_window_size=0"), 25, note="right"),
    Case("attention_window", None, attend("left_window_size=-1, right_window_size=-1"), 25),
    Case("attention_causal_cache", "wrong", CAUSAL_CACHE % "<is_causal=1>"),
    Case("attention_causal_cache", None, CAUSAL_CACHE % ""),
    Case("attention_causal_cache", None, attend("is_causal=1", query="1,4,8,64"), note="no past"),
    Case(
        "attention_outputs",
        "blocked",
        "g (float16[1,4,1,64] q, float16[1,2,8,64] k, float16[1,2,8,64] v) => (float16[1,4,1,64] o, "
        "float16[1,4,1,8] w) { o,,,w = Attention(q, k, v) }",
    ),
    Case("attention_outputs", None, attend()),
    Case(
        "attention_past",
        "blocked",
        attend(inputs="q, k, v,, m, n", more="float16[1,2,4,64] m, float16[1,2,4,64] n"),
    ),
    Case("attention_past", None, attend(inputs="q, k, v,,,")),
    Case("attention_softcap", "blocked", attend("softcap=2.0")),
    Case("attention_softcap", None, attend("softcap=0.0")),
    Case("attention_softmax_precision", "blocked", attend("softmax_precision=1")),
    Case("attention_softmax_precision", None, attend("scale=0.3")),
    Case("attention_mask_and_causal", "blocked", attend("is_causal=1", "q, k, v, m", more="float16[1,8] m")),
    Case("attention_mask_and_causal", None, attend("is_causal=0", "q, k, v, m", more="float16[1,8] m")),
    *(
        Case("attention_mask_type", verdict, attend(inputs="q, k, v, m", more=f"{dtype}[1,8] m"), note=dtype)
        for verdict, types in (("blocked", ("float", "bfloat16", "int32", "int8")), (None, ("float16", "bool")))
        for dtype in types
    ),
    Case("attention_mask_shape", "blocked", attend(inputs="q, k, v, m", more="float16[1,4] m")),
    Case("attention_mask_shape", None, attend(inputs="q, k, v, m", more="float16[1,1,1,8] m")),
    Case("attention_mask_shape", None, attend(inputs="q, k, v, m", more="float16[1,1] m"), note="broadcast"),
    Case(
        "attention_value_size",
        "blocked",
        "g (float16[1,4,1,64] q, float16[1,2,8,64] k, float16[1,2,8,128] v) => (float16[1,4,1,128] o) "
        "{ o = Attention(q, k, v) }",
    ),
    Case("attention_value_size", None, attend()),
    Case("attention_shared_keys", "blocked", TWO + "{ o = Attention(q, k, v) r = Attention(p, k, v) }", note="keys"),
    Case("attention_shared_keys", "blocked", TWO + "{ o = Attention(q, k, v) r = Attention(q, l, v) }", note="query"),
    Case("attention_shared_keys", None, TWO + "{ o = Attention(q, k, v) r = Attention(p, l, v) }", note="values"),
    Case(
        "attention_shared_keys",
        None,
        TWO + "{ n = Neg(k) o = Attention(q, n, v) r = Attention(p, n, l) }",
        note="computed keys",
    ),
    Case("attention_kernel", "blocked", attend(query="1,4,1,60", keys="1,2,8,60"), note="head size, one row"),
    Case("attention_kernel", "blocked", attend(query="1,4,32,320", keys="1,2,8,320"), note="head size, rows"),
    Case("attention_kernel", "blocked", attend(query="1,2,1,64"), note="two heads, one row"),
    Case("attention_kernel", "blocked", attend(**ROWS, dtype="float"), note="float32 rows"),
    Case(
        "attention_kernel",
        "blocked",
        attend(inputs="q, k, v, m", query="4,1,32,64", keys="4,1,64,64", more="float16[1,64] m"),
        note="one head, rows, mask",
    ),
    Case(
        "attention_kernel",
        "unverified",
        attend(inputs="q, k, v, m", query="4,1,S,64", keys="4,1,64,64", more="float16[1,64] m"),
        sizes=SPAN,
        note="one head, symbolic rows",
        buildable=False,
    ),
    Case("attention_kernel", "unverified", attend(query="1,4,S,64", dtype="float"), sizes=SPAN, buildable=False),
    Case("attention_kernel", "unverified", attend(query="B,2,1,64", keys="B,2,8,64"), sizes={"B": (2, 4, 8)}),
    Case(
        "attention_kernel",
        None,
        attend("TRT_decomposable=1", "q, k, v, m", query="4,1,32,64", keys="4,1,64,64", more="float16[1,64] m"),
        note="decomposable",
    ),
    Case("attention_kernel", None, attend(query="1,4,S,64"), sizes=SPAN, note="symbolic rows"),
    Case("attention_kernel", None, attend(query="1,4,1,40", keys="1,2,8,40"), note="40"),
    Case("attention_kernel", None, attend(query="1,4,32,100", keys="1,2,64,100"), note="100, rows"),
    Case("attention_bfloat16", "unverified", attend(dtype="bfloat16")),
    Case("attention_bfloat16", None, attend()),
    Case("attention_bool_mask", "slow", attend(inputs="q, k, v, m", **ROWS, more="bool[32,64] m")),
    Case("attention_bool_mask", None, attend(inputs="q, k, v, m", **ROWS, more="float16[32,64] m")),
    Case("unknown_operator", "blocked", element_wise("BitwiseAnd(x, z)", "int32")),
    Case("unknown_operator", "blocked", element_wise("com.microsoft.BiasGelu(x, z)"), domains=("com.microsoft",)),
    Case("unknown_operator", "blocked", twice("", False), domains=("semkv",), note="not lowered"),
    Case("unknown_operator", None, element_wise("Add(x, z)", "int32")),
    Case(
        "operator_needs_library",
        "blocked",
        "g (float16[1,1,256] q, float16[1,1,128] k, float16[1,1,128] v, float16[1,2,8,64] c, float16[1,2,8,64] d, "
        "int32[1] n, int32 t) => (float16[1,1,256] o, float16[1,2,8,64] a, float16[1,2,8,64] b) { o, a, b = "
        "com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, scale=0.125>(q, k, v, c, d, n, t) }",
        domains=("com.microsoft",),
    ),
    Case(
        "operator_needs_library",
        None,
        "g (float16[1,4,256] q, float16[1,4,256] k, float16[1,4,256] v) => (float16[1,4,256] o) "
        "{ o = com.microsoft.MultiHeadAttention<num_heads=4, scale=0.125>(q, k, v) }",
        domains=("com.microsoft",),
    ),
    Case("operator_of_another_domain", "wrong", element_wise("foo.Sub(x, z)"), domains=("foo",)),
    Case(
        "operator_of_another_domain",
        "wrong",
        element_wise("foo.Add(x, z)") + SUB % "Add",
        domains=("foo",),
        note="function",
    ),
    Case("operator_of_another_domain", None, element_wise("foo.Less2(x, z)") + SUB % "Less2", domains=("foo",)),
    Case(
        "multi_head_attention_causal",
        "wrong",
        "g (float16[1,4,256] q, float16[1,4,256] k, float16[1,4,256] v) => (float16[1,4,256] o) "
        "{ o = com.microsoft.MultiHeadAttention<num_heads=4, scale=0.125, unidirectional=1>(q, k, v) }",
        domains=("com.microsoft",),
    ),
    Case(
        "multi_head_attention_causal",
        None,
        "g (float16[1,4,256] q, float16[1,4,256] k, float16[1,4,256] v) => (float16[1,4,256] o) "
        "{ o = com.microsoft.MultiHeadAttention<num_heads=4, scale=0.125>(q, k, v) }",
        domains=("com.microsoft",),
    ),
    Case("plugin_hidden_by_function", "wrong", twice('<plugin_version="1">'), domains=("semkv",)),
    Case(
        "plugin_hidden_by_function",
        "wrong",
        twice('<plugin_namespace="semkv", plugin_version="2">'),
        domains=("semkv",),
        note="version",
    ),
    Case("plugin_hidden_by_function", "unverified", twice('<plugin_namespace="semkv">'), domains=("semkv",)),
    Case("plugin_hidden_by_function", None, twice(""), domains=("semkv",)),
    Case(
        "plugin_needed",
        "unverified",
        twice('<plugin_namespace="semkv", plugin_version="1">', False),
        domains=("semkv",),
        buildable=False,
    ),
    Case("plugin_needed", None, twice(""), domains=("semkv",)),
    Case("not_lowered", "slow", twice(""), domains=("semkv",)),
    Case("not_lowered", None, twice("").replace("semkv", "mine"), domains=("mine",)),
    *(
        Case(
            "scatter_reduction",
            verdict,
            f"g (float[8,4] x, int64[2,{width}] i, float[2,4] u) => (float[8,4] y) "
            f'{{ y = {operator}<reduction="{reduction}">(x, i, u) }}',
            note=f"{operator} {reduction}",
        )
        for operator, width in (("ScatterND", 1), ("ScatterElements", 4))
        for reduction, verdict in (("add", "blocked"), ("mul", "blocked"), ("max", "blocked"), ("none", None))
    ),
    Case("loop_in_branch", "blocked", branch(loop("h = Neg(s) so = Mul(h, k)", "z"))),
    Case(
        "loop_in_branch",
        "blocked",
        branch(
            loop(
                "so = If(b) <then_branch: graph = t2 () => (float[4] z2) { z2 = Neg(s) }, "
                "else_branch: graph = e2 () => (float[4] w2) { w2 = Tanh(s) }>",
                "z",
            )
        ),
        note="If inside",
    ),
    Case("loop_in_branch", None, branch(loop("h = Neg(s) r = Tanh(h) so = Mul(h, r)", "z"))),
    Case("loop_in_branch", None, branch(loop("h = Mul(s, k) so = Tanh(h)", "z")), note="first node"),
    Case(
        "loop_in_branch",
        None,
        "g (float[4] x, float[4] k) => (float[4] y) {" + loop("h = Neg(s) so = Mul(h, k)", "y") + "}",
        note="no branch",
    ),
    Case("old_opset", "unverified", "g (float[4] x) => (float[4] y) { y = Neg(x) }", 6),
    Case("old_opset", None, "g (float[4] x) => (float[4] y) { y = Neg(x) }", 7),
    Case("dynamic_input", "unverified", "g (float[N,4] x) => (float[N,4] y) { y = Neg(x) }", buildable=False),
    Case("dynamic_input", "unverified", "g (float[N,4] x) => (float[N,4] y) { y = Neg(x) }", sizes={"N": (1, 2, 4)}),
    Case("dynamic_input", None, "g (float[2,4] x) => (float[2,4] y) { y = Neg(x) }"),
    Case("input_type", "blocked", "g (int16[4] x) => (int16[4] y) { y = Identity(x) }"),
    Case("input_type", None, "g (int32[4] x) => (int32[4] y) { y = Identity(x) }"),
    Case("double_input", "wrong", element_wise("Add(x, z)", "double")),
    Case("double_input", None, element_wise("Add(x, z)", "float")),
]
"""Cases of `external_data`, which needs files, are in the test."""

"""Cases about what a value's rows are: a view of the cache that is read too late, keys that come from a cache."""

from __future__ import annotations

from .tensorrt_lint_cases import SCATTER, Case

CONSTANTS = (
    "zero = Constant<value = int64[1] {0}>() one = Constant<value = int64[1] {1}>() "
    "four = Constant<value = int64[1] {4}>() axis = Constant<value = int64[1] {2}>() "
    "shape = Constant<value = int64[4] {1, 2, 8, 64}>() other = Constant<value = int64[3] {2, 8, 64}>() "
    "square = Constant<value = int64[2] {64, 64}>() "
)

VIEWS = {
    "Reshape": "r = Reshape(c, other)",
    "Identity": "r = Identity(c)",
    "Identity twice": "s = Identity(c) r = Identity(s)",
    "Squeeze": "r = Squeeze(c, zero)",
    "Unsqueeze": "r = Unsqueeze(c, zero)",
    "Flatten": "r = Flatten(c)",
    "Cast": "r = Cast<to=10>(c)",
    "Slice": "r = Slice(c, zero, four, axis)",
    "Transpose": "r = Transpose<perm=[0,2,1,3]>(c)",
    "Expand": "r = Expand(c, shape)",
    "If": "r = If(b) <then_branch: graph = t1 () => (float16[1,2,8,64] y) { y = Identity(c) }, "
    "else_branch: graph = e1 () => (float16[1,2,8,64] z) { z = Neg(c) }>",
}
"""Text of a node that makes r, which may lie in the buffer of c."""


def viewed(view: str, body: str) -> str:
    """A graph in which r is a view of the cache c; inputs b, u and i, outputs o and n."""
    inputs = "float16[1,2,8,64] c, float16[1,2,1,64] u, int64[1] i, bool b"
    return f"g ({inputs}) => (float16[1,2,8,64] o, float16 n) {{ {CONSTANTS} {view} {body} }}"


FEEDS = "m = ReduceMax<keepdims=0>(r) x = Mul(u, m) o = TensorScatter(c, x, i)"
"""The append depends on r."""

KEYS = {
    "Slice": "k = Slice(o, zero, four, axis)",
    "Mul": "k = Mul(o, h)",
    "Add": "k = Add(h, o)",
    "Where": "k = Where(b, h, o)",
    "Gather": "j = Constant<value = int64[4] {0, 1, 2, 3}>() k = Gather<axis=2>(o, j)",
    "Concat": "k = Concat<axis=2>(h, o)",
    "MatMul": "w = ConstantOfShape<value = float16[1] {0}>(square) k = MatMul(o, w)",
}
"""Text of a node that makes keys k of the appended cache o."""


def causal(keys: str, rows: int = 8) -> str:
    inputs = (
        "float16[1,2,8,64] c, float16[1,2,1,64] u, int64[1] i, float16[1,2,8,64] h, bool[1,1,8,1] b, "
        f"float16[1,4,4,64] q, float16[1,2,{rows},64] v"
    )
    outputs = "float16[1,2,8,64] o, float16[1,4,4,64] a"
    return f"g ({inputs}) => ({outputs}) {{ {CONSTANTS} {SCATTER} {keys} a = Attention<is_causal=1>(q, k, v) }}"


ROWS_OF = {"Slice": 4, "Gather": 4, "Concat": 16}
NEXT_LAYER = (
    "g (float16[1,4,8,64] c, float16[1,4,8,64] u, int64[1] i, float16[1,4,8,64] q, float16[1,4,8,64] v) "
    "=> (float16[1,4,8,64] o, float16[1,4,8,64] a) { o = TensorScatter(c, u, i) e = Attention(q, o, v) k = Add(e, q) "
    "a = Attention<is_causal=1>(u, k, v) }"
)
NUMBERED = (
    "g (float16[1,2,8,64] c, float16[1,2,1,64] u, int64[1] i, float[4] %s, float[4] %s) "
    "=> (float16[1,2,8,64] o, float[4] n) { o = TensorScatter(c, u, i) n = Add(%s, %s) }"
)

CACHE_CASES = [
    *(
        Case("cache_read_order", "wrong", viewed(view, f"{FEEDS} n = ReduceSum<keepdims=0>(r)"), note=f"through {name}")
        for name, view in VIEWS.items()
    ),
    *(
        Case("cache_read_order", None, viewed(view, f"{FEEDS} n = ReduceMax<keepdims=0>(o)"), note=f"through {name}")
        for name, view in VIEWS.items()
    ),
    Case("cache_read_order", None, viewed("r = Neg(c)", f"{FEEDS} n = ReduceSum<keepdims=0>(r)"), note="a copy"),
    Case(
        "cache_read_order",
        None,
        viewed(
            "r = Cast<to=1>(c)",
            "m = ReduceMax<keepdims=0>(r) p = Cast<to=10>(m) "
            "x = Mul(u, p) o = TensorScatter(c, x, i) t = ReduceSum<keepdims=0>(r) n = Cast<to=10>(t)",
        ),
        note="a copy by Cast",
    ),
    *(
        Case("attention_causal_cache", "wrong", causal(keys, ROWS_OF.get(name, 8)), note=f"through {name}")
        for name, keys in KEYS.items()
    ),
    Case("attention_causal_cache", None, causal("k = Mul(h, h)"), note="computed keys"),
    Case("attention_causal_cache", None, NEXT_LAYER, note="the next layer"),
    Case("cache_name_prefix", "wrong", NUMBERED % (("bias_10", "bias_100") * 2), note="bias"),
    Case("cache_name_prefix", None, NUMBERED % (("bias_010", "bias_100") * 2), note="bias"),
    Case("cache_name_prefix", None, NUMBERED % (("input", "inputs") * 2), note="words"),
]

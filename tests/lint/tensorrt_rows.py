"""What TensorRT-RTX 1.7.1 was measured to do with each construct: one row each, with the rule that knows it.

The rows are those of the tables "what the importer does" and "which shapes get a fused kernel" of the project's notes,
all of them and in their order; `test_tensorrt_rules` runs the lint on each, and the builder where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from semkv_deploy.lint.onnxruntime import Verdict

from .tensorrt_lint_cases import CAUSAL_CACHE, SCATTER, SPAN, Case, append, attend
from .tensorrt_own_cases import LENGTHS, ONE_HEAD, OWN, attended

Make = Callable[..., str]
"""`attend` or `attended`: a model as text."""


class Row(NamedTuple):
    """A construct, the rules that are fatal to it (none: it is fine), and its models."""

    construct: str
    rules: tuple[str, ...]
    cases: tuple[Case, ...]


def row(
    construct: str, *bodies: str, rule: str = "append_axis", verdict: Verdict | None = None, **settings: Any
) -> Row:
    """A row whose models all have one verdict."""
    rules = (rule,) if verdict else ()
    return Row(construct, rules, tuple(Case(rule, verdict, body, note=construct, **settings) for body in bodies))


CIRCULAR = append('o = TensorScatter<axis=-2, mode="circular">(c, u, i)')
COMPUTED = (
    "g (float16[2,1,16,64] c, float16[2,1,1,64] u) => (float16[2,1,16,64] o) { p = Mul(c, u) "
    "last = Constant<value = int64[1] {3}>() s = ReduceSum<keepdims=0>(p, last) m = ArgMax<axis=2, keepdims=0>(s) "
    "one = Constant<value = int64[1] {1}>() i = Squeeze(m, one) o = TensorScatter(c, u, i) }"
)
RING = (
    "g (float16[1,2,8,64] c, float16[1,2,1,64] u, int64[1] step) => (float16[1,2,8,64] o) "
    "{ w = Constant<value = int64[1] {8}>() i = Mod(step, w) o = TensorScatter(c, u, i) }"
)
OUTPUTS = (
    "g (float16[1,4,1,64] q, float16[1,2,8,64] k, float16[1,2,8,64] v%s) => (float16[1,4,1,64] o, "
    "%s) { %s = Attention(%s) }"
)
THREE = (
    "g (float16[1,8,256] q, float16[1,8,128] k, float16[1,8,128] v) => (float16[1,8,256] o) { o = "
    "Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }"
)
SELECT = (
    "g (float16[2,32] s, float16[2,32,64] x, int64[2,1] j, float16[2,8,64] z) => (float16[2,8,64] y) "
    "{ n = Constant<value = int64[1] {8}>() best, t = TopK<axis=1>(s, n) last = Constant<value = int64[1] {2}>() "
    "u = Unsqueeze(t, last) shape = Constant<value = int64[3] {2, 8, 64}>() e = Expand(u, shape) "
    "g0 = GatherElements<axis=1>(x, e) y = ScatterND(g0, j, z) }"
)
COMPACTION = (
    "g (float16[2,4,32,64] q, float16[2,2,32,64] k, float16[2,2,32,64] v, float16[2,2,16,64] c, int64[2] i) "
    "=> (float16[2,4,32,64] o, float16[2,2,16,64] p) { o = Attention<is_causal=1>(q, k, v) square = Mul(k, k) "
    "last = Constant<value = int64[1] {3}>() s = ReduceSum<keepdims=0>(square, last) "
    "n = Constant<value = int64[1] {8}>() best, t = TopK<axis=2>(s, n) u = Unsqueeze(t, last) "
    "shape = Constant<value = int64[4] {2, 2, 8, 64}>() e = Expand(u, shape) r = GatherElements<axis=2>(k, e) "
    "p = TensorScatter(c, r, i) }"
)
MOBIUS = (
    "g (float16[1,1,256] q, float16[1,8,128] c, float16[1,8,128] d, float16[1,1,128] u, "
    "float16[1,1,128] w, int64[1] i, "
    "int64[1] n) => (float16[1,1,256] o, float16[1,8,128] a, float16[1,8,128] b) { a = TensorScatter<axis=1>(c, u, i) "
    "b = TensorScatter<axis=1>(d, w, i) o, x, y = Attention<q_num_heads=4, kv_num_heads=2>(q, a, b,,,, n) }"
)
TYPES = ("float16", "bfloat16", "float")
MASKS = ("[1,8]", "[2,1,1,8]", "[2,4,1,8]")
DECODE = {"query": "2,4,1,64", "keys": "2,2,8,64"}


def masked(element: str, mask: str, own: bool = False) -> str:
    make = attended if own else attend
    return make(inputs="q, k, v, m", **DECODE, dtype=element, more=f"{mask} m")


def decode(make: Make) -> list[str]:
    """The first line of the kernels' table: every head size and type without a mask, and every mask."""
    sizes = [
        make(query=f"2,4,1,{size}", keys=f"2,2,8,{size}", dtype=element)
        for size in (64, 80, 96, 128, 256)
        for element in TYPES
    ]
    return sizes + [
        masked(t, f"{kind}{mask}", make is attended) for t in TYPES for kind in (t, "bool") for mask in MASKS
    ]


def folded(make: Make) -> list[str]:
    """Heads in the batch, one row, a mask: groups of several sizes, capacities even and odd."""
    shapes = [(group, 256) for group in (1, 3, 4, 7)] + [(3, slots) for slots in (500, 513, 2048)]
    return [
        make(inputs="q, k, v, m", query=f"6,{group},1,64", keys=f"6,1,{slots},64", more=f"{kind}[6,1,1,{slots}] m")
        for group, slots in shapes
        for kind in ("float16", "bool")
    ]


def kernels(make: Make, name: str, **settings: Any) -> list[Row]:
    """The rows about fused kernels, for one of the two operators."""
    kernel = {"rule": "attention_kernel", **settings}
    rows = {"query": "4,2,32,64", "keys": "4,1,64,64", "inputs": "q, k, v, m"}
    one_bool = ONE_HEAD | {"more": "bool[1,64] m"}
    return [
        row(f"{name} [B,Hq,1,D], any mask", *decode(make), **kernel),
        row(f"{name} [B*Hkv,G,1,D], a mask", *folded(make), **kernel),
        row(f"{name} [B*Hkv,1,G,D], no mask", make(query="4,1,3,64", keys="4,1,64,64"), **kernel),
        row(
            f"{name} one query head, several rows, a mask",
            make(**ONE_HEAD),
            make(**one_bool),
            verdict="blocked",
            **kernel,
        ),
        row(
            f"{name} several query heads and rows, a mask",
            make(**rows, more="float16[32,64] m"),
            make(**rows, more="bool[32,64] m"),
            **kernel,
        ),
        row(f"{name} the failing shape, decomposable", make("TRT_decomposable=1", **ONE_HEAD), **kernel),
    ]


IMPORTER = [
    row("TensorScatter, linear, rank 4, static", append(SCATTER), append("o = TensorScatter<axis=2>(c, u, i)")),
    Row(
        "circular, dynamic capacity, not an input, not an output, chained",
        ("append_mode", "append_capacity", "append_source", "append_result"),
        (
            Case("append_mode", "blocked", CIRCULAR, note="row"),
            Case(
                "append_capacity", "blocked", append(SCATTER, "float16[1,2,C,64]"), sizes={"C": (8, 8, 8)}, note="row"
            ),
            Case("append_source", "blocked", append("n = Neg(c) o = TensorScatter(n, u, i)"), note="row"),
            Case("append_result", "blocked", append("n = TensorScatter(c, u, i) o = Neg(n)"), note="row"),
            Case(
                "append_source",
                "blocked",
                append("p = TensorScatter(c,u,i) o = TensorScatter(p,u,i)").replace(
                    " o) {", " o, float16[1,2,8,64] p) {"
                ),
                note="row, chained",
            ),
        ),
    ),
    row(
        "dynamic batch",
        append(SCATTER, "float16[B,2,8,64]", "float16[B,2,1,64]").replace("int64[1]", "int64[B]"),
        sizes={"B": (1, 2, 4)},
    ),
    row(
        "int32, int64, fp8 cache",
        *(append(SCATTER, f"{t}[1,2,8,64]", f"{t}[1,2,1,64]") for t in ("int32", "int64", "float8e4m3fn")),
        rule="append_type",
        verdict="blocked",
    ),
    row(
        "float32 side cache [N,1,C,1]",
        append(SCATTER, "float[2,1,16,1]", "float[2,1,1,1]").replace("int64[1]", "int64[2]"),
        rule="append_type",
    ),
    row("write_indices computed from the cache", COMPUTED, rule="cache_read_order"),
    row("ring buffer: the slot modulo the window", RING, rule="append_mode"),
    *(row(f"Attention of opset {n}, one output", attend(), rule="attention_outputs", opset=n) for n in (23, 24, 25)),
    row(
        "present or product outputs",
        OUTPUTS % ("", "float16[1,4,1,8] w", "o,,,w", "q, k, v"),
        rule="attention_outputs",
        verdict="blocked",
    ),
    row(
        "nonpad_kv_seqlen", attend(inputs="q, k, v,,,, n", more="int64[1] n"), rule="attention_length", verdict="wrong"
    ),
    row(
        "windows",
        attend("left_window_size=2"),
        attend("right_window_size=0"),
        rule="attention_window",
        verdict="wrong",
        opset=25,
    ),
    row("softcap", attend("softcap=2.0"), rule="attention_softcap", verdict="blocked"),
    row("softmax_precision", attend("softmax_precision=1"), rule="attention_softmax_precision", verdict="blocked"),
    row(
        "mask and is_causal",
        attend("is_causal=1", "q, k, v, m", more="float16[1,8] m"),
        rule="attention_mask_and_causal",
        verdict="blocked",
    ),
    row(
        "masks of every shape and type",
        *(masked(t, f"{kind}{mask}") for t in TYPES for kind in (t, "bool") for mask in MASKS),
        rule="attention_mask_type",
    ),
    row("is_causal over a cache", CAUSAL_CACHE % "<is_causal=1>", rule="attention_causal_cache", verdict="wrong"),
    row("3-D q, k, v with q_num_heads", THREE, rule="attention_kernel"),
    row(
        "TRT_Attention with a mask, with lengths, with both",
        attended(inputs="q, k, v, m", more="float16[1,8] m"),
        attended(**LENGTHS),
        attended(inputs="q, k, v, m,, n", more="float16[1,8] m, int32[1] n"),
        attended(inputs="q, k, v,, p, n", more="int32[2] p, int32[1] n"),
        rule="trt_attention_lengths",
        domains=OWN,
    ),
    *(
        row(f"{name} on {what}", make(f"{name}=1", **ONE_HEAD), rule="attention_kernel", verdict=verdict, domains=OWN)
        for what, make in (("Attention", attend), ("TRT_Attention", attended))
        for name, verdict in (("TRT_decomposable", None), ("decomposable", "blocked"))
    ),
    row("TopK, GatherElements, ScatterND", SELECT, rule="unknown_operator"),
    row("prefill compaction", COMPACTION, rule="attention_causal_cache"),
    Row(
        "mobius' static cache",
        ("append_rank", "append_axis", "attention_outputs", "attention_length"),
        (Case("append_rank", "blocked", MOBIUS, note="mobius"),),
    ),
    row("opset 28", "g (float[4] x) => (float[4] y) { y = Neg(x) }", rule="old_opset", opset=28),
]
KERNELS = [*kernels(attend, "Attention"), *kernels(attended, "TRT_Attention", domains=OWN)]
NO_PROFILE = Case("dynamic_input", "unverified", attend(query="1,4,S,64"), note="row", buildable=False)
PROFILE = Case("dynamic_input", "unverified", attend(query="1,4,S,64"), note="row, with a profile", sizes=SPAN)
ROW_CASES = [NO_PROFILE, PROFILE, *(case for entry in (*IMPORTER, *KERNELS) for case in entry.cases)]
"""The rows on external data are `test_external_data`'s."""

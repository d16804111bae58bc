"""Cases of TensorRT's own operators: the standard operators' rules on them, and the rules that only they have."""

from __future__ import annotations

from .tensorrt_lint_cases import CAUSAL_CACHE, ROWS, Case, append, attend

OWN = ("trt",)
UPDATE = "o = trt.TRT_KVCacheUpdate%s(c, u, i)"
LATE = append(f"{UPDATE % ''} n = ReduceMax(c)").replace(" o) {", " o, float16[1,1,1,1] n) {")
PACKED = (
    "g (float16[2,2,8,64] c, float16[4,2,64] u, int32[2] i, int32[3] n) => (float16[2,2,8,64] o) "
    '{ o = trt.TRT_KVCacheUpdate<update_form="packed_nhd">(%s) }'
)


def own(text: str) -> str:
    """The same with TensorRT's operators in place of the standard ones."""
    return text.replace("Attention", "trt.TRT_Attention").replace("TensorScatter", "trt.TRT_KVCacheUpdate")


def attended(attributes: str = "", inputs: str = "q, k, v", **shapes: str) -> str:
    return own(attend(attributes, inputs, **shapes))


LENGTHS = {"inputs": "q, k, v,,, n", "more": "int32[1] n"}
ONE_HEAD = {"inputs": "q, k, v, m", "query": "4,1,32,64", "keys": "4,1,64,64", "more": "float16[1,64] m"}

OWN_CASES = [
    *(
        Case(
            "append_type",
            None,
            append(UPDATE.replace("trt.", f"{domain}.".lstrip(".")) % ""),
            domains=domains,
            note=f"update {domain}",
        )
        for domain, domains in (("", ()), ("trt", OWN), ("tensorrt", ("tensorrt",)), ("other", ("other",)))
    ),
    *(
        Case(
            "append_type",
            "blocked",
            append(UPDATE % "", f"{dtype}[1,2,8,64]", f"{dtype}[1,2,1,64]"),
            domains=OWN,
            note=f"update {dtype}",
        )
        for dtype in ("int8", "int32", "float8e4m3fn")
    ),
    Case("append_mode", "blocked", append(UPDATE % '<mode="circular">'), domains=OWN, note="update"),
    Case("append_axis", "blocked", append(UPDATE % "<axis=1>"), domains=OWN, note="update"),
    Case(
        "append_capacity",
        "blocked",
        append(UPDATE % "", "float16[1,2,C,64]"),
        domains=OWN,
        sizes={"C": (8, 8, 8)},
        note="update",
    ),
    Case(
        "append_source",
        "blocked",
        append(f"n = Neg(c) {UPDATE % ''}".replace("(c, u", "(n, u")),
        domains=OWN,
        note="update",
    ),
    Case(
        "append_result", "blocked", append("n = trt.TRT_KVCacheUpdate(c, u, i) o = Neg(n)"), domains=OWN, note="update"
    ),
    Case(
        "append_once",
        "blocked",
        append(f"n = Neg(u) {UPDATE % ''} p = trt.TRT_KVCacheUpdate(c, n, i)").replace(
            " o) {", " o, float16[1,2,8,64] p) {"
        ),
        domains=OWN,
        note="update",
    ),
    Case("cache_read_order", "wrong", LATE, domains=OWN, note="update"),
    Case(
        "cache_read_order",
        None,
        append(f"{UPDATE % ''} n = ReduceMax(o)").replace(" o) {", " o, float16[1,1,1,1] n) {"),
        domains=OWN,
        note="update",
    ),
    Case("attention_kernel", "blocked", attended(**ONE_HEAD), domains=OWN, note="own, one head, rows, mask"),
    Case("attention_kernel", "blocked", attended("decomposable=1", **ONE_HEAD), domains=OWN, note="own, decomposable"),
    Case("attention_kernel", None, attended("TRT_decomposable=1", **ONE_HEAD), domains=OWN, note="own, decomposable"),
    Case("attention_kernel", "blocked", attended(**ROWS, dtype="float"), domains=OWN, note="own, float32 rows"),
    Case(
        "attention_kernel",
        "blocked",
        attended(query="1,4,32,100", keys="1,2,64,100", **LENGTHS),
        domains=OWN,
        note="own, 100, lengths",
    ),
    Case(
        "attention_kernel",
        None,
        attended(query="1,4,32,104", keys="1,2,64,104", **LENGTHS),
        domains=OWN,
        note="own, 104, lengths",
    ),
    Case(
        "attention_kernel",
        None,
        attended(query="1,4,32,100", keys="1,2,64,100", inputs="q, k, v, m,, n", more="float16[32,64] m, int32[1] n"),
        domains=OWN,
        note="own, 100, mask, lengths",
    ),
    Case(
        "attention_outputs",
        "blocked",
        own(
            "g (float16[1,4,1,64] q, float16[1,2,8,64] k, float16[1,2,8,64] v) => (float16[1,4,1,64] o, "
            "float16[1,4,1,8] w) { o, w = Attention(q, k, v) }"
        ),
        domains=OWN,
        note="own",
    ),
    Case("attention_window", "wrong", attended("left_window_size=2"), domains=OWN, note="own"),
    Case("attention_causal_cache", "wrong", own(CAUSAL_CACHE % '<causal_kind="upper_left">'), domains=OWN, note="own"),
    Case("attention_causal_cache", None, own(CAUSAL_CACHE % '<causal_kind="lower_right">'), domains=OWN, note="own"),
    *(
        Case(
            "attention_mask_and_causal",
            "blocked",
            attended(f'causal_kind="{kind}"', "q, k, v, m", more="float16[1,8] m"),
            domains=OWN,
            note=f"own {kind}",
        )
        for kind in ("upper_left", "lower_right")
    ),
    Case(
        "attention_mask_and_causal",
        None,
        attended('causal_kind="none"', "q, k, v, m", more="float16[1,8] m"),
        domains=OWN,
        note="own",
    ),
    Case("attention_mask_type", "blocked", attended(inputs="q, k, v, m", more="float[1,8] m"), domains=OWN, note="own"),
    Case(
        "attention_mask_shape", "blocked", attended(inputs="q, k, v, m", more="float16[1,4] m"), domains=OWN, note="own"
    ),
    Case(
        "attention_value_size",
        "blocked",
        own(
            "g (float16[1,4,1,64] q, float16[1,2,8,64] k, float16[1,2,8,128] v) => (float16[1,4,1,128] o) { "
            "o = Attention(q, k, v) }"
        ),
        domains=OWN,
        note="own",
    ),
    Case(
        "attention_shared_keys",
        "blocked",
        "g (float16[1,2,8,64] c, float16[1,2,1,64] u, int64[1] i, float16[1,4,1,64] q, "
        "float16[1,4,1,64] p, float16[1,2,8,64] v) => (float16[1,2,8,64] o, float16[1,4,1,64] a, "
        "float16[1,4,1,64] b) { o = trt.TRT_KVCacheUpdate(c, u, i) a = Attention(q, o, v) b = "
        "Attention(p, o, v) }",
        domains=OWN,
        note="updated cache",
    ),
    *(
        Case("trt_attention_ignored", "wrong", attended(f"{name}={value}"), domains=OWN, note=name)
        for name, value in (("scale", 0.3), ("softcap", 2.0), ("is_causal", 1), ("softmax_precision", 1))
    ),
    Case(
        "trt_attention_ignored",
        "wrong",
        attended(inputs="q, k, v,,,, n", more="int64[1] n"),
        domains=OWN,
        note="7th input",
    ),
    Case("trt_attention_ignored", None, attended("is_causal=0", **LENGTHS), domains=OWN),
    *(
        Case("trt_attention_choice", verdict, attended(f'{name}="{value}"'), domains=OWN, note=value)
        for name, value, verdict in (
            ("causal_kind", "true", "blocked"),
            ("TRT_normalization_op", "sigmoid", "blocked"),
            ("query_form", "bsh", "blocked"),
            ("causal_kind", "none", None),
            ("TRT_normalization_op", "softmax", None),
            ("query_form", "padded_bhnd", None),
        )
    ),
    Case(
        "trt_attention_rank",
        "blocked",
        own(
            "g (float16[1,8,256] q, float16[1,8,128] k, float16[1,8,128] v) => (float16[1,8,256] o) { o = "
            "Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }"
        ),
        domains=OWN,
    ),
    Case("trt_attention_rank", None, attended(), domains=OWN),
    Case(
        "trt_attention_packed",
        "blocked",
        own(
            "g (float16[8,4,64] q, float16[2,2,8,64] k, float16[2,2,8,64] v, int32[3] n) => "
            '(float16[8,4,64] o) { o = Attention<query_form="packed_nhd">(q, k, v,, n) }'
        ),
        domains=OWN,
    ),
    Case("trt_attention_packed", None, attended('query_form="padded_bhnd"'), domains=OWN),
    Case(
        "trt_attention_lengths", "blocked", attended(inputs="q, k, v,,, n", more="int32[2] n"), domains=OWN, note="keys"
    ),
    Case(
        "trt_attention_lengths",
        "blocked",
        attended(inputs="q, k, v,, n", more="int32[1] n"),
        domains=OWN,
        note="queries",
    ),
    Case("trt_attention_lengths", None, attended(inputs="q, k, v,, n, m", more="int32[2] n, int64[1] m"), domains=OWN),
    Case(
        "trt_update_form",
        "blocked",
        append("o = trt.TRT_KVCacheUpdate(c, u, i, n)").replace("int64[1] i", "int64[1] i, int64[1] n"),
        domains=OWN,
        note="lengths",
    ),
    Case("trt_update_form", "blocked", PACKED % "c, u, i", domains=OWN, note="no lengths"),
    Case(
        "trt_update_form",
        "blocked",
        (PACKED % "c, u, i, n").replace("[4,2,64]", "[2,2,1,64]"),
        domains=OWN,
        note="rank",
    ),
    Case("trt_update_form", None, PACKED % "c, u, i, n", domains=OWN),
]

"""NexusAttention: append rows to a static KV cache, then attend over it with one bias per slot.

Inputs (B batch, Hq query heads, Hkv key/value heads, S new rows, C capacity, D head size; T float32, float16,
bfloat16):
    query        [B,Hq,S,D]   T      rotary embedding applied
    key, value   [B,Hkv,S,D]  T      rotary embedding applied (key)
    key_cache, value_cache  [B,Hkv,C,D]  T
    slot_bias    [B,Hkv,C]    float32  added to the logits of the slots below `length`: log(cluster size), 0, or
                                       -inf (dead)
    length       [B]          int64    live slots per batch row, in rows; the caller guarantees length + S <= C
Outputs:
    output       [B,Hq,S,D]   T
    key_cache_out, value_cache_out  [B,Hkv,C,D]  T   the caches with the new rows in slots length .. length+S-1
Attributes:
    scale    float, 0: 1/sqrt(D).
    causal   int, 1: row r, which sits at slot p = length + r, sees slot j iff j <= p; 0: iff j < length + S.
    softcap  float, 0: off; c: logits become c * tanh(logit / c), before the bias is added (Gemma 2).
    window   int, 0: off; w: row r sees slot j only if p - j < w.

    logit(r, j) = softcap(scale * q_r . k_j) + (slot_bias[j] if j < length else 0)

Query head h uses key/value head h // (Hq/Hkv). Slots at and above length + S are dead: any finite content of the caches
there, and any bias, changes nothing; so does a slot below length whose bias is -inf. Logits, softmax and the weighted
sum are float32; the output is cast to T.

Options, each a further attribute of its name on the node (`OP.with_options`), in any combination but int8 with fp8:
    indexed  input slot_index [B,Hkv,W] int64: of the slots below `length` only those named here are attended to, in any
             order; negative entries name none, and a slot named twice counts twice. New rows are attended to as ever,
             nothing else is read. An entry of `length` or more is an error (the body takes it as naming none).
    int8     key_cache and value_cache are int8, with inputs key_scale, value_scale and outputs key_scale_out,
             value_scale_out [B,Hkv,C] float32. A cached row is code * scale of its slot; a new row x is stored with
             scale = max|x| / 127 (float32 division) and code = x / scale rounded half to even (a row of zeros: scale 0,
             code 0), and attended to as stored, so that a prompt gives the same in one piece and in several.
    fp8      the same in float8e4m3fn, with 448 for 127 and the type's own rounding.
    mass     output attention_mass [B,Hkv,C] float32: the softmax weight that each slot got, summed over the S rows and
             the Hq/Hkv query heads of its KV head. It sums to S * Hq/Hkv over the slots; 0 where none was attended to.

A scale for each slot and KV head, not for each channel: a row is quantised when it is appended and never again for the
sake of its neighbours, and a scale per channel would need calibration or a rewrite of the cache whenever a channel
grows. It costs 4 bytes in D + 4. `CompactCache` and `SemanticCluster` have neither 8-bit caches nor scales among their
inputs: a cache of codes can be appended to and attended over, but not yet compressed.

Source: proportional attention of SemantiCache (arXiv 2603.14303, eq. 4: softmax(q.K/sqrt(d) + log s) V) and the Nexus
tokens of SONIC, on a cache whose shape never changes.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops.nexus_attention_body import CODE_LIMIT, body
from semkv_deploy.ops.spec import OperatorSpec, Option, parse_function, register_torch_op, sizes, tensors

if TYPE_CHECKING:
    import onnx
    from torch import Tensor


def _quantized(name: str, dtype: str, other: str) -> Option:
    caches = ("key_cache", "value_cache")
    return Option(
        name,
        inputs=tensors("key_scale B,Hkv,C float32", "value_scale B,Hkv,C float32"),
        outputs=tensors("key_scale_out B,Hkv,C float32", "value_scale_out B,Hkv,C float32"),
        dtypes={tensor: dtype for cache in caches for tensor in (cache, f"{cache}_out")},
        excludes=(other,),
    )


OP = OperatorSpec(
    name="NexusAttention",
    inputs=tensors(
        "query B,Hq,S,D T",
        "key B,Hkv,S,D T",
        "value B,Hkv,S,D T",
        "key_cache B,Hkv,C,D T",
        "value_cache B,Hkv,C,D T",
        "slot_bias B,Hkv,C float32",
        "length B int64",
    ),
    outputs=tensors("output B,Hq,S,D T", "key_cache_out B,Hkv,C,D T", "value_cache_out B,Hkv,C,D T"),
    attributes={"scale": 0.0, "causal": 1, "softcap": 0.0, "window": 0},
    options=(
        Option("indexed", inputs=tensors("slot_index B,Hkv,W int64")),
        _quantized("int8", "int8", "fp8"),
        _quantized("fp8", "float8e4m3fn", "int8"),
        Option("mass", outputs=tensors("attention_mass B,Hkv,C float32")),
    ),
)


def quantize(rows: Tensor, option: str) -> tuple[Tensor, Tensor]:
    """Rows [...,D] as codes [...,D] of "int8" or "fp8" and their scales [...], float32; the arithmetic is float32."""
    import torch

    rows, limit = rows.to(torch.float32), CODE_LIMIT[option]
    scale = rows.abs().amax(-1) / torch.full((), limit, device=rows.device)
    ratio = rows / torch.where(scale > 0, scale, 1.0)[..., None]
    if option == "int8":
        return ratio.round().clamp(-limit, limit).to(torch.int8), scale
    return ratio.clamp(-limit, limit).to(torch.float8_e4m3fn), scale


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_bias: Tensor,
    length: Tensor,
    scale: float = 0.0,
    causal: int = 1,
    softcap: float = 0.0,
    window: int = 0,
    *,
    slot_index: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    mass: bool = False,
) -> tuple[Tensor, ...]:
    """The contract, one batch row and one query head at a time; float64 inputs are computed in float64.

    The caches' type says whether they are quantised; `mass` asks for the output of that option.

    Raises SemkvError when shapes disagree, Hq is not a multiple of Hkv, length + S > C, slot_index names a slot that is
    not there, or scales come without a quantised cache or the other way round.
    """
    import torch

    quantized = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(key_cache.dtype)
    if (quantized is None) != (key_scale is None) or (key_scale is None) != (value_scale is None):
        raise SemkvError("scales belong to int8 and fp8 caches", where=OP.name, got=key_cache.dtype)
    given = {"indexed": slot_index is not None, quantized: True}
    spec = OP.with_options(*(option.name for option in OP.options if given.get(option.name)))
    optional = [t for t in (slot_index, key_scale, value_scale) if t is not None]
    inputs = (query, key, value, key_cache, value_cache, slot_bias, length, *optional)
    dim = sizes([(tensor.shape, t.shape) for tensor, t in zip(spec.inputs, inputs, strict=True)])
    rows, capacity = dim["S"], dim["C"]
    if dim["Hq"] % dim["Hkv"]:
        raise SemkvError(
            "query heads must be a multiple of KV heads", where=OP.name, expected=dim["Hkv"], got=dim["Hq"]
        )
    if bool(((length < 0) | (length + rows > capacity)).any()):
        raise SemkvError(
            "the new rows do not fit the cache",
            where=OP.name,
            expected=f"length + {rows} <= {capacity}",
            got=length.tolist(),
        )
    if slot_index is not None and bool((slot_index >= length[:, None, None]).any()):
        raise SemkvError(
            "slot_index names slots that are not there",
            where=OP.name,
            expected=f"less than length {length.tolist()}",
            got=slot_index.amax((1, 2)).tolist(),
        )
    group = dim["Hq"] // dim["Hkv"]
    factor = scale or 1.0 / math.sqrt(dim["D"])
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = torch.empty_like(query)
    received = torch.zeros(slot_bias.shape, dtype=accumulate, device=query.device)
    caches = [key_cache.clone(), value_cache.clone()]
    scales = [t.clone() for t in (key_scale, value_scale) if t is not None]
    for i, new in enumerate((key, value)):
        codes, steps = quantize(new, quantized) if quantized else (new, None)
        for b, start in enumerate(length.tolist()):
            caches[i][b, :, start : start + rows] = codes[b]
            if steps is not None:
                scales[i][b, :, start : start + rows] = steps[b]
    slots = torch.arange(capacity, device=query.device)
    for b, start in enumerate(length.tolist()):
        position = torch.arange(start, start + rows, device=query.device)[:, None]
        for h in range(dim["Hq"]):
            kv, slot = h // group, slots
            if slot_index is not None:
                named = slot_index[b, kv]
                slot = torch.cat([named[named >= 0], slots[start : start + rows]])
            read = slice(None) if slot_index is None else slot
            visible = slot <= position if causal else (slot < start + rows).expand(rows, len(slot))
            if window > 0:
                visible = visible & (position - slot < window)
            k, v = (cache[b, kv][read].to(accumulate) for cache in caches)
            if scales:
                k, v = (t * s[b, kv][read, None].to(accumulate) for t, s in zip((k, v), scales, strict=True))
            bias = torch.where(slot < start, slot_bias[b, kv][read].to(accumulate), 0.0)
            logits = factor * (query[b, h].to(accumulate) @ k.T)
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            seen = visible & (bias > -math.inf)
            weights = torch.softmax(torch.where(seen, logits + bias, -math.inf), dim=-1)
            output[b, h] = (weights @ v).to(query.dtype)
            received[b, kv].index_add_(0, slot, weights.sum(0))
    return (output, *caches, *scales, *([received] if mass else []))


def _register_torch(spec: OperatorSpec) -> None:
    """`torch.ops.semkv.nexus_attention` with the options of `spec`."""
    import torch

    names = [*spec.input_names, *OP.attributes]

    def run(*values: Any, **named: Any) -> tuple[Tensor, ...]:
        return reference(**dict(zip(names, values, strict=False)), **named, mass="mass" in spec.attributes)

    def trace(*values: Any, **named: Any) -> tuple[Tensor, ...]:
        inputs = dict(zip(names, values, strict=False)) | named
        like = {f"{name}_out": tensor for name, tensor in inputs.items()} | {"output": inputs["query"]}
        like["attention_mass"] = inputs["slot_bias"]
        return tuple(torch.empty_like(like[output.name]) for output in spec.outputs)

    register_torch_op(spec, run, trace)


@functools.cache
def register_torch() -> None:
    """Register `torch.ops.semkv.nexus_attention` and an overload for each set of options; further calls do nothing."""
    for spec in OP.variants():
        _register_torch(spec)


def options_of(node: onnx.NodeProto) -> list[str]:
    """Names of the options that a node has as attributes."""
    given = {attribute.name for attribute in node.attribute if attribute.i}
    return [option.name for option in OP.options if option.name in given]


def function_proto(*options: str) -> onnx.FunctionProto:
    """The operator's body in standard operators, for nodes with these options: TensorScatter, two float32 MatMuls and a
    float32 Softmax; with "indexed" GatherND reads the named rows only.

    ONNX Runtime 1.32 has no TensorScatter of float8e4m3fn, ONNX no GatherND of it: with "fp8" the caches are cast to
    float32 and back around them, which loses nothing, but is a copy of the whole cache and never in place.
    """
    return parse_function(OP.with_options(*options), body(*options))

"""Forms of operators that the native library of ONNX Runtime has beside the portable ones: no body, so no other target.

They take caches as they lie: codes with their scales, keys as their positions rotated them. So nothing is widened or
rotated whole around them. On a node the options are in the operator's name, as in `SemanticCluster_unrotated_int8`.

Option int8 (both): caches are int8, and each row's scale [B,H,C] float32 goes in and comes out; element = code x scale.
A slot that is kept comes out as it went in, scale and codes; one that is merged is quantised as NexusAttention does it:
the largest magnitude becomes 127, ratios are rounded half to even. A dead slot's scale is 0.

Option unrotated of SemanticCluster: rows of keys are rotated back before they are compared or averaged, by halves, over
the first 2 F channels, by the angles slot_position x frequency (float32); a mean key is rotated to its seed's position.
    slot_position  [B,G,C]  int64    as the slot column of that name
    frequency      [F]      float32  radians for each position; 2 F <= D
A cluster whose bias is its seed's has its seed's key bit for bit.

Attribute seed_keys of SemanticCluster: with 1 every cluster has its seed's key bit for bit, not a mean.

Option fitted of CompactCache: slots that stay are then fitted to reference queries, as `methods/attention_matching.py`
states it: biases, and with attribute values = 1 (default) values. A slot whose value was fitted is narrowed anew.
    length, target     [B]        int64    rows of the batch at or below their target are only compacted
    scored             []         float32  0: nothing is fitted
    reference_queries  [B,H,R,D]  float32  scaled; a row of zeros is none
Every slot in keep_index is then live and named once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from semkv_deploy.ops import compact_cache, semantic_cluster
from semkv_deploy.ops.spec import OperatorSpec, Option, TensorSpec, tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INT8 = Option(
    "int8",
    inputs=tensors("key_scale B,H,C float32", "value_scale B,H,C float32"),
    outputs=tensors("key_scale_out B,H,C float32", "value_scale_out B,H,C float32"),
    dtypes=dict.fromkeys(("key_cache", "value_cache", "key_cache_out", "value_cache_out"), "int8"),
)

UNROTATED = Option("unrotated", inputs=tensors("slot_position B,G,C int64", "frequency F float32"))

FITTED = Option(
    "fitted",
    inputs=(
        *tensors("length B int64", "target B int64"),
        TensorSpec("scored", "", "float32"),
        *tensors("reference_queries B,H,R,D float32"),
    ),
)

SPECS: dict[str, OperatorSpec] = {
    "SemanticCluster": replace(
        semantic_cluster.OP,
        attributes={**semantic_cluster.OP.attributes, "seed_keys": 0},
        options=(UNROTATED, INT8),
    ),
    "CompactCache": replace(compact_cache.OP, attributes={"values": 1}, options=(FITTED, INT8)),
}
"""By operator: whoever takes caches of another type and gives them back."""


def compact_reference(
    key_cache: Tensor,
    value_cache: Tensor,
    slot_bias: Tensor,
    keep_index: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`CompactCache`, where codes come with scales that move as biases do, but are 0 in dead slots."""
    key, value, bias, length = compact_cache.reference(key_cache, value_cache, slot_bias, keep_index)
    scales = [
        compact_cache.reference(scale[..., None], scale[..., None], slot_bias, keep_index)[0][..., 0]
        for scale in (key_scale, value_scale)
        if scale is not None
    ]
    return key, value, bias, length, *scales


def cluster_reference(
    key_cache: Tensor,
    value_cache: Tensor,
    slot_bias: Tensor,
    length: Tensor,
    chunk_id: Tensor,
    thresholds: Tensor,
    target: Tensor,
    *,
    slot_position: Tensor | None = None,
    frequency: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    span: int = 64,
    seed_keys: int = 0,
) -> tuple[Tensor, ...]:
    """`SemanticCluster` of rows in float32, rotated back where there are positions, and narrowed again."""
    import torch

    wide_key, wide_value = widened(key_cache, key_scale), widened(value_cache, value_scale)
    compared = wide_key
    if slot_position is not None and frequency is not None:
        compared = rotated(wide_key, -slot_position, frequency)
    key, value, bias, new_length, source, level = semantic_cluster.reference(
        compared, wide_value, slot_bias, length, chunk_id, thresholds, target, span=span
    )
    seed = source.clamp_min(0)
    if slot_position is not None and frequency is not None:
        key = rotated(key, slot_position.gather(2, seed), frequency)
    (keys, key_scales), (values, value_scales) = (narrowed(rows, key_cache.dtype) for rows in (key, value))
    for b, h, slot in torch.cartesian_prod(*(torch.arange(size) for size in bias.shape)).tolist():
        group = h if source.shape[1] > 1 else 0
        origin = int(seed[b, group, slot])
        if source[b, group, slot] < 0:
            for rows in (keys, values, key_scales, value_scales):
                rows[b, h, slot] = 0
            continue
        # Merged with nothing: the very bits it came from.
        alone = bool(bias[b, h, slot] == slot_bias[b, group, origin])
        for kept, rows, cache, scales, scale in (
            (alone or bool(seed_keys), keys, key_cache, key_scales, key_scale),
            (alone, values, value_cache, value_scales, value_scale),
        ):
            if kept:
                rows[b, h, slot] = cache[b, h, origin]
                scales[b, h, slot] = 0 if scale is None else scale[b, h, origin]
    for b in torch.nonzero(level < 0).flatten().tolist():
        keys[b], values[b] = key_cache[b], value_cache[b]
        if key_scale is not None and value_scale is not None:
            key_scales[b], value_scales[b] = key_scale[b], value_scale[b]
    more = (key_scales, value_scales) if key_scale is not None else ()
    return keys, values, bias, new_length, source, level, *more


# What the references are made of; tests make their inputs with it.


def rotated(rows: Tensor, position: Tensor, frequency: Tensor) -> Tensor:
    """Rows [B,H,C,D] turned by positions [B,G,C], by halves."""
    import torch

    half = len(frequency)
    angle = position[..., None].float() * frequency
    first, second, rest = rows.split([half, half, rows.shape[-1] - 2 * half], -1)
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat([*turned, rest], -1)


def widened(cache: Tensor, scale: Tensor | None) -> Tensor:
    """Rows in float32, of codes and scales or of another type."""
    return cache.float() if scale is None else cache.float() * scale[..., None]


def narrowed(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of a type, and their scales."""
    import torch

    scale = rows.abs().amax(-1) / 127
    if dtype != torch.int8:
        return rows.to(dtype), scale
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]
    return (rows / divisor).round().clamp(-127, 127).to(dtype), scale

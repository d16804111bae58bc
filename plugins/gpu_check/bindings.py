"""The kernels' C interface (plugins/c_abi) called on torch tensors: device pointers on a GPU, or CPU memory with the
emulated build. Only torch and ctypes are needed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""Element types of quantised caches; any other cache has the query's."""


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    kinds = {"p": c_void_p, "i": c_int32, "f": c_float, "l": c_int64}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for n, k in pairs]})


NexusAttentionParams = _structure(
    "NexusAttentionParams",
    "query:p key:p value:p slot_index:p key_cache:p value_cache:p slot_bias:p length:p key_scale:p value_scale:p "
    "output:p mass:p workspace:p batch:i query_heads:i kv_heads:i rows:i capacity:i head_size:i index_width:i scale:f "
    "softcap:f causal:i window:i split_halves:i element:i cache:i",
)
CompactCacheParams = _structure(
    "CompactCacheParams",
    "key_cache:p value_cache:p slot_bias:p keep_index:p key_cache_out:p value_cache_out:p slot_bias_out:p length_out:p "
    "workspace:p batch:i heads:i capacity:i head_size:i groups:i element:i",
)
SemanticClusterParams = _structure(
    "SemanticClusterParams",
    "key_cache:p value_cache:p slot_bias:p length:p chunk_id:p thresholds:p target:p key_cache_out:p value_cache_out:p "
    "slot_bias_out:p length_out:p source_slot:p level:p workspace:p batch:i heads:i capacity:i head_size:i groups:i "
    "levels:i span:i element:i",
)
SemanticBlockMapParams = _structure(
    "SemanticBlockMapParams",
    "key_cache:p block_start:p block_length:p representatives:p block_slots:p batch:i kv_heads:i capacity:i "
    "head_size:i blocks:i vectors:i max_block_length:i element:i",
)
SemanticBlockSelectParams = _structure(
    "SemanticBlockSelectParams",
    "query:p representatives:p block_slots:p block_count:p pinned:p slot_index:p workspace:p batch:i query_heads:i "
    "kv_heads:i rows:i head_size:i blocks:i vectors:i max_block_length:i width:i reduce_max:i element:i",
)


class Kernels:
    """The functions of one built library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("nexus_attention", "compact_cache", "semantic_cluster", "semantic_block_select"):
            getattr(self.library, f"semkv_{name}_workspace").restype = c_size_t
            getattr(self.library, f"semkv_{name}").argtypes = [c_void_p, c_void_p]
            getattr(self.library, f"semkv_{name}_workspace").argtypes = [c_void_p]
        self.library.semkv_semantic_block_map.argtypes = [c_void_p, c_void_p]
        self.library.semkv_set_schedule.argtypes = [c_uint64]

    def workspace(self, name: str, params: ctypes.Structure, device: torch.device) -> torch.Tensor:
        """A workspace of the size the operator asks for, filled with 0xFF (NaN): nothing may rely on its content."""
        size = getattr(self.library, f"semkv_{name}_workspace")(ctypes.byref(params))
        return torch.full((size,), 0xFF, dtype=torch.uint8, device=device)

    def call(self, name: str, params: ctypes.Structure, device: torch.device) -> None:
        """Launch on the current stream. Raises RuntimeError with the CUDA error code."""
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        if code := getattr(self.library, f"semkv_{name}")(ctypes.byref(params), c_void_p(stream)):
            raise RuntimeError(f"semkv_{name}: CUDA error {code}")


def pointer(tensor: torch.Tensor) -> int:
    """Address of a contiguous tensor's first element."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class Prepared:
    """One call with all its buffers, to be launched any number of times: what is timed holds no allocation and no fill.

    outputs: the operator's outputs, in its order; overwritten by every launch. buffers: what must live as long.
    """

    def __init__(
        self,
        kernels: Kernels,
        name: str,
        params: ctypes.Structure,
        outputs: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
    ) -> None:
        self.kernels, self.name, self.params, self.outputs = kernels, name, params, tuple(outputs)
        self.buffers = [*buffers]
        self.device = outputs[0].device
        if hasattr(params, "workspace"):
            self.buffers.append(kernels.workspace(name, params, self.device))
            params.workspace = pointer(self.buffers[-1])

    def __call__(self) -> None:
        """Launch on the current stream. Raises RuntimeError with the CUDA error code."""
        self.kernels.call(self.name, self.params, self.device)


def nexus_attention_params(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_bias: torch.Tensor,
    length: torch.Tensor,
    output: torch.Tensor,
    *,
    slot_index: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    mass: torch.Tensor | None = None,
    **attributes: Any,
) -> ctypes.Structure:
    """The C structure of one call; the workspace is left to the caller. Caches and scales are updated, output and mass
    written."""
    batch, query_heads, rows, head_size = query.shape
    optional = {"slot_index": slot_index, "key_scale": key_scale, "value_scale": value_scale, "mass": mass}
    return NexusAttentionParams(
        **{name: pointer(tensor) for name, tensor in optional.items() if tensor is not None},
        query=pointer(query),
        key=pointer(key),
        value=pointer(value),
        key_cache=pointer(key_cache),
        value_cache=pointer(value_cache),
        slot_bias=pointer(slot_bias),
        length=pointer(length),
        output=pointer(output),
        workspace=0,
        batch=batch,
        query_heads=query_heads,
        kv_heads=key.shape[1],
        rows=rows,
        capacity=key_cache.shape[2],
        head_size=head_size,
        index_width=0 if slot_index is None else slot_index.shape[2],
        scale=attributes.get("scale", 0.0),
        softcap=attributes.get("softcap", 0.0),
        causal=attributes.get("causal", 1),
        window=attributes.get("window", 0),
        split_halves=attributes.get("split_halves", 0),
        element=ELEMENTS[query.dtype],
        cache=CODES.get(key_cache.dtype, 0),
    )


def prepare_nexus_attention(
    kernels: Kernels,
    inputs: tuple[torch.Tensor, ...],
    options: dict[str, torch.Tensor] | None = None,
    **attributes: Any,
) -> Prepared:
    """The operator on the given caches and scales, which it updates; output and mass start as NaN so that an element
    nobody writes is seen.

    options: slot_index, key_scale, value_scale where the case has them. With mass=True the mass is the last output.
    """
    query, _, _, key_cache, value_cache, slot_bias, _ = inputs
    given = dict(options or {})
    outputs = [_poisoned(query), key_cache, value_cache]
    outputs += [given[name] for name in ("key_scale", "value_scale") if name in given]
    if attributes.pop("mass", False):
        given["mass"] = _poisoned(slot_bias)
        outputs.append(given["mass"])
    params = nexus_attention_params(*inputs, outputs[0], **given, **attributes)
    return Prepared(kernels, "nexus_attention", params, outputs, [*inputs, *given.values()])


def nexus_attention(
    kernels: Kernels,
    inputs: tuple[torch.Tensor, ...],
    options: dict[str, torch.Tensor] | None = None,
    **attributes: Any,
) -> tuple[torch.Tensor, ...]:
    """The operator on copies of the caches and scales; see `prepare_nexus_attention`."""
    copies = tuple(t.clone() if i in (3, 4) else t for i, t in enumerate(inputs))
    given = {name: tensor.clone() for name, tensor in (options or {}).items()}
    prepared = prepare_nexus_attention(kernels, copies, given, **attributes)
    prepared()
    return prepared.outputs


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, float("nan"))


def _caches(inputs: Sequence[torch.Tensor], in_place: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """key_cache, value_cache and slot_bias, and the outputs for them: the same buffers (copies), or buffers of NaN."""
    caches = [t.clone() for t in inputs[:3]] if in_place else [*inputs[:3]]
    return caches, caches if in_place else [_poisoned(t) for t in caches]


def prepare_compact_cache(kernels: Kernels, inputs: tuple[torch.Tensor, ...], in_place: bool) -> Prepared:
    """The operator with outputs of its own, or on copies of the caches in place."""
    caches, outputs = _caches(inputs, in_place)
    keep_index = inputs[3]
    batch, heads, capacity, head_size = caches[0].shape
    outputs = [*outputs, keep_index.new_full((batch,), -7)]
    params = CompactCacheParams(
        *(pointer(t) for t in (*caches, keep_index, *outputs)),
        0,
        batch,
        heads,
        capacity,
        head_size,
        keep_index.shape[1],
        ELEMENTS[caches[0].dtype],
    )
    return Prepared(kernels, "compact_cache", params, outputs, [*caches, keep_index])


def compact_cache(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], in_place: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One call of `prepare_compact_cache`."""
    prepared = prepare_compact_cache(kernels, inputs, in_place)
    prepared()
    keys, values, bias, length = prepared.outputs
    return keys, values, bias, length


def prepare_semantic_cluster(kernels: Kernels, inputs: tuple[torch.Tensor, ...], span: int, in_place: bool) -> Prepared:
    """The operator with outputs of its own, or on copies of the caches in place."""
    caches, outputs = _caches(inputs, in_place)
    length, chunk_id, thresholds, target = inputs[3:]
    batch, heads, capacity, head_size = caches[0].shape
    groups, levels = chunk_id.shape[1:3]
    shapes = ((batch,), (batch, groups, capacity), (batch,))
    outputs = [*outputs, *(length.new_full(shape, -7) for shape in shapes)]
    params = SemanticClusterParams(
        *(pointer(t) for t in (*caches, length, chunk_id, thresholds, target, *outputs)),
        0,
        batch,
        heads,
        capacity,
        head_size,
        groups,
        levels,
        span,
        ELEMENTS[caches[0].dtype],
    )
    return Prepared(kernels, "semantic_cluster", params, outputs, [*caches, length, chunk_id, thresholds, target])


def semantic_cluster(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], span: int, in_place: bool
) -> tuple[torch.Tensor, ...]:
    """One call of `prepare_semantic_cluster`."""
    prepared = prepare_semantic_cluster(kernels, inputs, span, in_place)
    prepared()
    return prepared.outputs


def prepare_semantic_block_map(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], vectors: int, max_block_length: int
) -> Prepared:
    """The operator; outputs start as NaN and -7."""
    key_cache, block_start, _ = inputs
    batch, kv_heads, capacity, head_size = key_cache.shape
    blocks = block_start.shape[1]
    representatives = _poisoned(key_cache.new_empty((batch, kv_heads, blocks, vectors, head_size)))
    block_slots = block_start.new_full((batch, blocks, max_block_length), -7)
    params = SemanticBlockMapParams(
        *(pointer(t) for t in (*inputs, representatives, block_slots)),
        batch,
        kv_heads,
        capacity,
        head_size,
        blocks,
        vectors,
        max_block_length,
        ELEMENTS[key_cache.dtype],
    )
    return Prepared(kernels, "semantic_block_map", params, (representatives, block_slots), inputs)


def semantic_block_map(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], vectors: int, max_block_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of `prepare_semantic_block_map`."""
    prepared = prepare_semantic_block_map(kernels, inputs, vectors, max_block_length)
    prepared()
    return prepared.outputs[0], prepared.outputs[1]


def prepare_semantic_block_select(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], width: int, reduce_max: int
) -> Prepared:
    """The operator; its output starts as -7."""
    query, representatives, block_slots = inputs[:3]
    batch, query_heads, rows, head_size = query.shape
    kv_heads, blocks, vectors = representatives.shape[1:4]
    slot_index = block_slots.new_full((batch, kv_heads, width), -7)
    params = SemanticBlockSelectParams(
        *(pointer(t) for t in (*inputs, slot_index)),
        0,
        batch,
        query_heads,
        kv_heads,
        rows,
        head_size,
        blocks,
        vectors,
        block_slots.shape[2],
        width,
        reduce_max,
        ELEMENTS[query.dtype],
    )
    return Prepared(kernels, "semantic_block_select", params, (slot_index,), inputs)


def semantic_block_select(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], width: int, reduce_max: int
) -> tuple[torch.Tensor]:
    """One call of `prepare_semantic_block_select`."""
    prepared = prepare_semantic_block_select(kernels, inputs, width, reduce_max)
    prepared()
    return (prepared.outputs[0],)

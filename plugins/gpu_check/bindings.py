"""The kernels' C interface (plugins/c_abi) called on torch tensors: device pointers on a GPU, or CPU memory with the
emulated build. Only torch and ctypes are needed."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    kinds = {"p": c_void_p, "i": c_int32, "f": c_float, "l": c_int64}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for n, k in pairs]})


NexusAttentionParams = _structure(
    "NexusAttentionParams",
    "query:p key:p value:p key_cache:p value_cache:p slot_bias:p length:p output:p workspace:p batch:i query_heads:i "
    "kv_heads:i rows:i capacity:i head_size:i scale:f softcap:f causal:i window:i max_waves:i element:i",
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


class Kernels:
    """The functions of one built library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("nexus_attention", "compact_cache", "semantic_cluster"):
            getattr(self.library, f"semkv_{name}_workspace").restype = c_size_t
            getattr(self.library, f"semkv_{name}").argtypes = [c_void_p, c_void_p]
            getattr(self.library, f"semkv_{name}_workspace").argtypes = [c_void_p]
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


def nexus_attention_params(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_bias: torch.Tensor,
    length: torch.Tensor,
    output: torch.Tensor,
    **attributes: Any,
) -> ctypes.Structure:
    """The C structure of one call; the workspace is left to the caller."""
    batch, query_heads, rows, head_size = query.shape
    return NexusAttentionParams(
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
        scale=attributes.get("scale", 0.0),
        softcap=attributes.get("softcap", 0.0),
        causal=attributes.get("causal", 1),
        window=attributes.get("window", 0),
        max_waves=attributes.get("max_waves", 0),
        element=ELEMENTS[query.dtype],
    )


def nexus_attention(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], **attributes: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator on copies of the caches; the output starts as NaN so that a row nobody writes is seen."""
    query, key, value, key_cache, value_cache, slot_bias, length = inputs
    keys, values = key_cache.clone(), value_cache.clone()
    output = torch.full_like(query, float("nan"))
    params = nexus_attention_params(query, key, value, keys, values, slot_bias, length, output, **attributes)
    scratch = kernels.workspace("nexus_attention", params, query.device)
    params.workspace = pointer(scratch)
    kernels.call("nexus_attention", params, query.device)
    return output, keys, values


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, float("nan"))


def compact_cache(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], in_place: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator with outputs of its own, or on copies of the caches in place."""
    key_cache, value_cache, slot_bias, keep_index = inputs
    caches = [t.clone() for t in (key_cache, value_cache, slot_bias)]
    outputs = caches if in_place else [_poisoned(t) for t in caches]
    batch, heads, capacity, head_size = key_cache.shape
    length_out = torch.full((batch,), -7, dtype=torch.int64, device=key_cache.device)
    params = CompactCacheParams(
        *(pointer(t) for t in (*caches, keep_index, *outputs, length_out)),
        0,
        batch,
        heads,
        capacity,
        head_size,
        keep_index.shape[1],
        ELEMENTS[key_cache.dtype],
    )
    scratch = kernels.workspace("compact_cache", params, key_cache.device)
    params.workspace = pointer(scratch)
    kernels.call("compact_cache", params, key_cache.device)
    return outputs[0], outputs[1], outputs[2], length_out


def semantic_cluster(
    kernels: Kernels, inputs: tuple[torch.Tensor, ...], span: int, in_place: bool
) -> tuple[torch.Tensor, ...]:
    """The operator with outputs of its own, or on copies of the caches in place."""
    key_cache, value_cache, slot_bias, length, chunk_id, thresholds, target = inputs
    caches = [t.clone() for t in (key_cache, value_cache, slot_bias)]
    outputs = caches if in_place else [_poisoned(t) for t in caches]
    batch, heads, capacity, head_size = key_cache.shape
    groups, levels = chunk_id.shape[1:3]
    length_out = torch.full((batch,), -7, dtype=torch.int64, device=key_cache.device)
    source_slot = torch.full((batch, groups, capacity), -7, dtype=torch.int64, device=key_cache.device)
    level = torch.full((batch,), -7, dtype=torch.int64, device=key_cache.device)
    tensors = (*caches, length, chunk_id, thresholds, target, *outputs, length_out, source_slot, level)
    params = SemanticClusterParams(
        *(pointer(t) for t in tensors),
        0,
        batch,
        heads,
        capacity,
        head_size,
        groups,
        levels,
        span,
        ELEMENTS[key_cache.dtype],
    )
    scratch = kernels.workspace("semantic_cluster", params, key_cache.device)
    params.workspace = pointer(scratch)
    kernels.call("semantic_cluster", params, key_cache.device)
    return (*outputs, length_out, source_slot, level)

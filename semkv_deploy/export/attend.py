"""What stands in for attention while a decoder is traced or run by the reference: one `semkv::NexusAttention` a layer.

transformers models call whatever attention function their config names. Ours hands the layer's query, key and value
to an `Attend`, which travels down as a keyword argument; there is no mask (the name is left out of transformers' mask
registry, so none is built) and no transformers cache. The window, scale and soft cap come from the keyword arguments
that FlashAttention also relies on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from semkv_deploy.errors import SemkvError

IMPLEMENTATION = "semkv_nexus"
"""Name of the attention function in transformers' registry."""

# Anything else with a value may change the result (attention sinks arrive as `s_aux`, a learned bias as
# `position_bias`), so it is refused and not ignored.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "logits_to_keep", "return_dict"}


@dataclass(frozen=True)
class LayerSpec:
    """One layer's attention: head counts, head size and the operator's attributes (window and softcap: 0 is off)."""

    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int

    @property
    def attributes(self) -> dict[str, float | int]:
        """Attributes of the layer's `NexusAttention` node."""
        return {"scale": self.scale, "causal": 1, "softcap": self.softcap, "window": self.window}


Attend = Callable[[int, LayerSpec, Tensor, Tensor, Tensor], Tensor]
"""(layer, spec, query [B,Hq,S,D], key [B,Hkv,S,D], value [B,Hkv,S,D]), rotary applied -> output [B,Hq,S,D]."""


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    semkv_attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns ([B,S,Hq,D], no attention weights)."""
    where = f"{type(module).__name__}, layer {getattr(module, 'layer_idx', '?')}"
    if semkv_attend is None:
        raise SemkvError("this architecture does not pass keyword arguments on to its attention layers", where=where)
    unknown = sorted(
        name for name, given in kwargs.items() if given is not None and given is not False and name not in _HARMLESS
    )
    if unknown:
        raise SemkvError("attention has features that NexusAttention does not", where=where, got=", ".join(unknown))
    if attention_mask is not None:
        raise SemkvError("attention brings a mask of its own", where=where, got=f"shape {list(attention_mask.shape)}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise SemkvError("attention is bidirectional", where=where, expected="causal attention of a decoder")
    if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1]:
        raise SemkvError(
            "head sizes of query, key and value differ (multi-head latent attention is not supported)",
            where=where,
            expected="one head size",
            got=(query.shape[-1], key.shape[-1], value.shape[-1]),
        )
    spec = LayerSpec(
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
        softcap=float(softcap or 0.0),
        window=int(sliding_window or 0),
    )
    layer = module.layer_idx
    assert isinstance(layer, int)
    return semkv_attend(layer, spec, query, key, value).transpose(1, 2), None


@functools.cache
def _register() -> None:
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_function)


@contextmanager
def nexus_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lets the model's layers attend through `semkv_attend` inside the block; its own attention comes back after it.

    A rotary table that would change with the length of the sequence is held at its first form meanwhile.

    Raises:
        SemkvError: when the architecture does not use transformers' attention interface.
    """
    _register()
    before = model.config._attn_implementation
    tables = _length_dependent_tables(model)
    kept = [(table, table.rope_type, table.inv_freq.clone()) for table in tables]
    try:
        for table in tables:
            # transformers' update looks at this name only; the forward pass is the same for every type.
            table.rope_type = "default"
            table.inv_freq.copy_(table.original_inv_freq)
        try:
            model.set_attn_implementation(IMPLEMENTATION)
        except ValueError as error:
            raise unsupported(model, error) from error
        if model.config._attn_implementation != IMPLEMENTATION:
            raise unsupported(model, "its attention is not built on transformers' attention interface")
        yield
    finally:
        model.set_attn_implementation(before)
        for table, kind, inv_freq in kept:
            table.rope_type = kind
            table.inv_freq.copy_(inv_freq)


def _length_dependent_tables(model: PreTrainedModel) -> list[Any]:
    """Rotary modules of type "dynamic" or "longrope": they switch tables once a sequence exceeds a length.

    Keys cached before would stay turned by the old table, so the first one is what is exported, and the sequence ends
    where it does (`max_position` in `facts`).
    """
    tables = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if not {"dynamic", "longrope"} & {k for k in kinds if isinstance(k, str)}:
            continue
        if not isinstance(kind, str) or not hasattr(module, "original_inv_freq"):
            raise unsupported(model, f"its rotary embedding depends on the sequence length per layer type ({kind})")
        tables.append(module)
    return tables


def unsupported(model: PreTrainedModel, reason: object) -> SemkvError:
    """The error for an architecture that cannot be exported."""
    return SemkvError(
        "this architecture cannot be exported",
        where=type(model).__name__,
        got=reason,
        fix="use a decoder whose layers all call transformers' attention interface (Llama, Qwen, Mistral, Gemma, Phi)",
    )

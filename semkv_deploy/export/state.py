"""Whether keys and values are all that a model carries from token to token.

Some decoders keep more: a Mamba state, a convolution's last inputs, a token shift. Their attention looks like any
other, so a few tokens are run twice: whole through transformers' own code, and in two pieces with nothing but a cache
of keys and values in between.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from semkv_deploy.export.attend import LayerSpec, nexus_attention, unsupported
from semkv_deploy.ops.nexus_attention import reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 12
FIRST_PIECE = 7

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the largest logit; other types are coarser."""

COARSE = 5e-2

_checked: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""Models that passed: each is asked several times while it is exported."""


class _Cache:
    """An `Attend` that appends each layer's keys and values and attends to all of them by the operator's reference."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer not in self._layers:
            empty = torch.zeros(1, spec.kv_heads, TOKENS, spec.head_dim, dtype=key.dtype)
            self._layers[layer] = (empty, empty)
        caches = self._layers[layer]
        bias = torch.zeros(1, spec.kv_heads, TOKENS)
        length = torch.tensor([self.length])
        attributes: dict[str, Any] = spec.attributes
        output, keys, values = reference(query, key, value, *caches, bias, length, **attributes)
        self._layers[layer] = (keys, values)
        return output


def check_state(model: PreTrainedModel) -> None:
    """Compares logits of the second piece with those of the same tokens in one run.

    Raises:
        SemkvError: when they differ, naming the architecture.
    """
    if model in _checked:
        return
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(TOKENS)[None] * 7919 % max(1, vocabulary - 1) + (1 if vocabulary > 1 else 0)
    positions = torch.arange(TOKENS)[None]
    with torch.no_grad():
        try:
            whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        except Exception as error:
            raise unsupported(model, f"{type(error).__name__}: {error}") from error
        cache, pieces = _Cache(), []
        with nexus_attention(model):
            for start, stop in ((0, FIRST_PIECE), (FIRST_PIECE, TOKENS)):
                cache.length = start
                piece = slice(start, stop)
                out = model(
                    input_ids=ids[:, piece], position_ids=positions[:, piece], use_cache=False, semkv_attend=cache
                )
                pieces.append(out.logits[0])
    difference = (torch.cat(pieces) - whole).abs().amax(-1)
    allowed = TOLERANCE.get(model.dtype, COARSE) * max(float(whole.abs().max()), 1e-6)
    if not bool((difference <= allowed).all()):
        first = int((difference > allowed).float().argmax()) if bool((difference > allowed).any()) else 0
        raise unsupported(
            model,
            f"with nothing but keys and values between two pieces of a text, logits from token {first} on differ from"
            f" those of one run by {float(difference.max()):.3g}: it has a state beside its KV cache, or attends in a"
            " way of its own",
        )
    _checked.add(model)

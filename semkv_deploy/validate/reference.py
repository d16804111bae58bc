"""A session in plain PyTorch: the checkpoint's own model, the operators' references, the methods' references.

Slow and obvious; every target's logits, caches and chosen slots are compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.methods.reference import compress
from semkv_deploy.targets.onnxruntime.engine import Compressed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from semkv_deploy.methods.base import Method
    from semkv_deploy.model.config import ModelFacts


class ReferenceEngine:
    """What `targets.onnxruntime.engine.OnnxRuntimeEngine` does, with torch tensors."""

    def __init__(self, model: PreTrainedModel, *, facts: ModelFacts, method: Method, batch: int, capacity: int) -> None:
        from semkv_deploy.export.decoder import ReferenceDecoder, cache_names, present_names

        self.facts, self.method, self.batch, self.capacity = facts, method, batch, capacity
        self.groups = method.groups(facts.kv_heads)
        self._decoder = ReferenceDecoder(model)
        self._names = [
            (cache_names(layer, facts.layers), present_names(layer, facts.layers)) for layer in range(facts.layers)
        ]
        self._caches = self._decoder.empty_caches(batch, capacity)

    def layer(self, number: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
        """Key, value `[B,H,C,D]` and bias `[B,H,C]` of a layer."""
        key, value, bias = (self._caches[name].numpy() for name in self._names[number][0])
        return key, value, bias

    def cache_bytes(self) -> int:
        """Bytes of all cache tensors."""
        return sum(cache.nbytes for cache in self._caches.values())

    def reset(self) -> None:
        self._caches = self._decoder.empty_caches(self.batch, self.capacity)

    def run(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        length: NDArray[np.int64],
        row: int | None = None,
    ) -> NDArray[np.float32]:
        import torch

        rows = slice(None) if row is None else slice(row, row + 1)
        inputs: dict[str, Tensor] = {name: cache[rows] for name, cache in self._caches.items()}
        small = {"input_ids": tokens, "position_ids": positions, "logits_index": logits_index, "length": length}
        inputs.update({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in small.items()})
        outputs = self._decoder(inputs)
        for (key, value, _), (new_key, new_value) in self._names:
            self._caches[key][rows], self._caches[value][rows] = outputs[new_key], outputs[new_value]
        return outputs["logits"].float().numpy()

    def compress(
        self, state: Sequence[dict[str, NDArray[np.int64]]], inputs: Sequence[dict[str, Any]]
    ) -> list[Compressed]:
        return [self._compress_layer(*layer) for layer in zip(range(len(state)), state, inputs, strict=True)]

    def _compress_layer(self, layer: int, state: dict[str, NDArray[np.int64]], inputs: dict[str, Any]) -> Compressed:
        import torch

        names = self._names[layer][0]
        before = dict(zip(("key_cache", "value_cache", "slot_bias"), (self._caches[n] for n in names), strict=True))
        before.update({name: torch.from_numpy(array.copy()) for name, array in state.items()})
        after = compress(
            self.method,
            self.facts,
            before,
            target=torch.from_numpy(inputs["target"]),
            sinks=int(inputs["sinks"]),
            recent=torch.from_numpy(inputs["recent"]),
            thresholds=inputs["thresholds"].tolist(),
        )
        for name, part in zip(names, ("key_cache", "value_cache", "slot_bias"), strict=True):
            self._caches[name] = after[part]
        small = ("length", "slot_position", "slot_chunk", "level", "evicted")
        return Compressed(*(after[name].numpy() for name in small))

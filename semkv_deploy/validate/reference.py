"""A session in plain PyTorch: the checkpoint's own model, the operators' references, the methods' references.

Slow and obvious; every target's logits, caches and chosen slots are compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.methods.slot_attention import RECORD, Look
from semkv_deploy.model.names import REFERENCE_QUERIES, SLOT_ATTENTION, cache_names, decoder_input, present_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from semkv_deploy.bundle.contract import Contract
    from semkv_deploy.bundle.opened import OpenedBudget
    from semkv_deploy.methods import Method
    from semkv_deploy.methods.layout import Buffer
    from semkv_deploy.model.config import ModelFacts
    from semkv_deploy.targets.engine import Array, Feeds

_INPUT = {"key": "key_cache", "value": "value_cache", "slot_bias": "slot_bias"}
"""Buffers that every method has, and what compressors call them."""


class ReferenceEngine:
    """Follows a contract whose groups are one a layer, with torch tensors: a `targets.engine.Engine`."""

    def __init__(
        self, opened: OpenedBudget, model: PreTrainedModel, *, facts: ModelFacts, method: Method, batch: int
    ) -> None:
        from semkv_deploy.export.decoder import ReferenceDecoder

        self.opened, self.facts, self.method, self.batch = opened, facts, method, batch
        layers = facts.layers
        self._looks: list[Look] = []
        self._decoder = ReferenceDecoder(model, watch=lambda *look: self._looks.append(Look(*look)))
        self._names = [(cache_names(layer, layers), present_names(layer, layers)) for layer in range(layers)]
        self.reset()

    @property
    def contract(self) -> Contract:
        return self.opened.contract

    def _tensor(self, buffer: str, group: int) -> str:
        if buffer not in _INPUT:
            return decoder_input(buffer, group, len(self._names))
        return self._names[group][0][list(_INPUT).index(buffer)]

    def read(self, buffer: str, group: int) -> Array:
        array: Array = self._caches[self._tensor(buffer, group)].numpy()
        return array

    def write(self, buffer: str, group: int, array: Array) -> None:
        import torch

        self._caches[self._tensor(buffer, group)] = torch.from_numpy(array.copy())

    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values())

    @property
    def _recorded(self) -> list[Buffer]:
        """Buffers that the decoder writes in recorded runs."""
        return [each for each in self.contract.cache.buffers if each.name in (SLOT_ATTENTION, REFERENCE_QUERIES)]

    def reset(self, row: int | None = None) -> None:
        import torch

        empty = self._decoder.empty_caches(self.batch, self.contract.capacity)
        # One capacity for all layers while they are made; then each group's own.
        for group, of in enumerate(self.contract.cache.groups):
            for name in self._names[group][0]:
                empty[name] = empty[name][:, :, : of.capacity]
            for buffer in self._recorded:
                sizes = buffer.sizes(of, batch=self.batch, head_dim=self.contract.head_dim)
                empty[self._tensor(buffer.name, group)] = torch.zeros(sizes)
        if row is None:
            self._caches: dict[str, Tensor] = empty
        else:
            for name, cache in empty.items():
                self._caches[name][row] = cache[row]

    def run(self, program: str, feeds: Feeds, *, row: int | None = None) -> dict[str, Array]:
        import torch

        rows = slice(None) if row is None else slice(row, row + 1)
        inputs: dict[str, Tensor] = {name: cache[rows] for name, cache in self._caches.items()}
        inputs.update({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()})
        self._looks.clear()
        with self.method.rewritten(self._decoder.model):
            outputs = self._decoder(inputs)
        for buffer in self._recorded if self._recorded and feeds[RECORD.name].any() else []:
            for group, look in enumerate(self._looks):
                name = self._tensor(buffer.name, group)
                before = self._caches[name][rows]
                if buffer.name == SLOT_ATTENTION:
                    after = torch.maximum(before, look.largest())
                else:
                    after = look.queries(before, *feeds[RECORD.name].tolist())
                self._caches[name][rows] = after
        for (key, value, _), (new_key, new_value) in self._names:
            self._caches[key][rows], self._caches[value][rows] = outputs[new_key], outputs[new_value]
        return {"logits": outputs["logits"].float().numpy()}

    def run_groups(self, program: str, feeds: Mapping[int, Feeds]) -> dict[int, dict[str, Array]]:
        return {group: self._run_group(program, group, given) for group, given in feeds.items()}

    def _run_group(self, program: str, group: int, feeds: Feeds) -> dict[str, Array]:
        import torch

        buffers = {**_INPUT, **{buffer.name: buffer.name for buffer in self._recorded}}
        state = {name: self._caches[self._tensor(buffer, group)] for buffer, name in buffers.items()}
        inputs: dict[str, Any] = {}
        counted = ["length", *(column.name for column in self.contract.cache.slot_columns)]
        for name, array in feeds.items():
            if name in counted:
                state[name] = torch.from_numpy(array.copy())
            elif name == "thresholds":
                inputs[name] = array.tolist()
            else:
                inputs[name] = array.item() if array.ndim == 0 else torch.from_numpy(array.copy())
        after = self.method.reference(program)(self.facts, state, **inputs)
        for buffer, name in buffers.items():
            self._caches[self._tensor(buffer, group)] = after[name]
        small = {f"{name}_out": after[name] for name in counted}
        return {name: tensor.numpy() for name, tensor in (small | {k: after[k] for k in ("level", "evicted")}).items()}

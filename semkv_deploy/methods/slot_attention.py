"""How much each slot is looked at, as a decoder writes it down: the buffer, and the slow statement of what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.methods.layout import Buffer, CacheLayout
from semkv_deploy.model import names

if TYPE_CHECKING:
    from torch import Tensor

SLOT_ATTENTION = Buffer(name=names.SLOT_ATTENTION, shape="B,Hkv,C", dtype="float32")

RECORD = Buffer(name="record", shape="2", dtype="int64")
"""The decoder's input that says whether a run is recorded: the run's number among those of a reading, from 1, or 0; and
how many there are."""


def with_slot_attention(layout: CacheLayout, *more: Buffer) -> CacheLayout:
    """A layout whose decoder records attention, and `more` in the same runs."""
    return layout.model_copy(update={"buffers": (*layout.buffers, SLOT_ATTENTION, *more), "step_inputs": (RECORD,)})


class Look(NamedTuple):
    """What the reference sees of one attention: the slow statement of what is recorded.

    Attributes:
        query: `[B,Hq,S,D]`.
        keys: `[B,Hkv,C,D]`, of live slots and of what the run appended.
        length: `[B]`, before the run.
        scale, softcap: of the attention; 0: 1/sqrt(D), none.
    """

    query: Tensor
    keys: Tensor
    length: Tensor
    scale: float
    softcap: float

    def queries(self, before: Tensor, number: int, runs: int) -> Tensor:
        """`reference_queries` `[B,Hkv,R,D]` after run `number` (from 1) of a reading in so many: its share of them."""
        batch, heads, count, dim = before.shape
        result = before.clone()
        for b in range(batch):
            for h in range(heads):
                rows = self.query[b].reshape(heads, -1, dim)[h].float() * (self.scale or dim**-0.5)
                for place in range(count):
                    run, inside = divmod(place * runs, count)
                    if run == number - 1:
                        result[b, h, place] = rows[inside * len(rows) // count]
        return result

    def largest(self) -> Tensor:
        """`[B,Hkv,C]`: the largest weight that a row of the run gives each slot, 0 at and above the length."""
        import torch

        batch, heads, slots, dim = self.keys.shape
        result = torch.zeros(batch, heads, slots)
        for b in range(batch):
            live = int(self.length[b])
            for h in range(heads if live else 0):
                rows = self.query[b].reshape(heads, -1, dim)[h].float()
                logits = rows @ self.keys[b, h, :live].float().T * (self.scale or dim**-0.5)
                if self.softcap:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                result[b, h, :live] = torch.softmax(logits, -1).amax(0)
        return result

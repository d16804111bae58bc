"""One training example's losses: which passes through the model each of them takes.

`match` takes a pass of the text with a full cache, without gradients, and a pass of the Nexus rows alone: layer by
layer they see the text's keys and values, and what later turns' queries would get from them is compared with what they
got from the bodies. The other losses take the whole dialogue with the student's mask, in one pass, and (`kd`, `attn`)
the text once more with a full cache.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semkv_deploy.train import losses
from semkv_deploy.train.layout import PAD, Batch, causal, sight

if TYPE_CHECKING:
    from semkv_deploy.export.attention import Attend, LayerSpec
    from semkv_deploy.methods.sonic_adapter import Corner
    from semkv_deploy.train.recipe import LossWeights
    from semkv_deploy.train.student import Student


class Look(NamedTuple):
    """A layer's query `[B,Hq,S,D]`, key and value `[B,Hkv,S,D]`, output `[B,Hq,S,D]`, and the logits' scale."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float


def attend_to(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention `[B,Hq,Q,D]` over the keys that are seen, bool `[B,Q,K]`; KV heads are shared by groups of heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], scale=scale)


def attention_weights(query: Tensor, key: Tensor, seen: Tensor, scale: float) -> Tensor:
    """`[B,Hq,Q,K]` softmax weights, float32, over the keys that are seen."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.transpose(-1, -2)).float() * scale
    return logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)


def masked(seen: Tensor, looks: dict[int, Look] | None = None, layers: Collection[int] | None = None) -> Attend:
    """Attention under one mask for all layers, bool `[B,S,S]`.

    Args:
        looks: receives what the layers in `layers` (None: all) worked on.
    """

    def attend(layer: int, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = attend_to(query, key, value, seen, spec.scale)
        if looks is not None and (layers is None or layer in layers):
            looks[layer] = Look(query, key, value, output, spec.scale)
        return output

    return attend


def contiguous(batch: Batch) -> Tensor:
    """`[B,T]` positions of the text alone, as a model has them that knows nothing of Nexus rows."""
    rows = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return rows.expand_as(batch.ids)


class Objective(nn.Module):
    """Losses of a batch, by name.

    Args:
        guided: layers that `attn` and `reg` look at.
        answer_weight: how much more a token counts that repeats what an earlier turn says.
    """

    def __init__(
        self, student: Student, *, corner: Corner, guided: Collection[int], answer_weight: float, floor: float
    ) -> None:
        super().__init__()
        self.student, self.corner, self.guided = student, corner, sorted(set(guided))
        self.answer_weight, self.floor = answer_weight, floor

    def forward(self, batch: Batch, weights: LossWeights) -> dict[str, Tensor]:
        """The losses whose weights are not 0, and `total`, their weighted sum."""
        with self.student.attending():
            found: dict[str, Tensor] = {}
            if weights.match:
                found |= self._matched(batch, weights.rec > 0 and not weights.whole)
            if weights.whole:
                found |= self._whole(batch, weights)
        named = weights.model_dump()
        found = {name: loss for name, loss in found.items() if named[name]}
        found["total"] = torch.stack([loss * named[name] for name, loss in found.items()]).sum()
        return found

    def row_weights(self, batch: Batch) -> Tensor:
        """`[B,T]`: 0 for rows of X, the first turn, what fills up and a dialogue's last row; answers count more."""
        counted = (batch.turn > 0) & (batch.target >= 0)
        return counted * (1 + (self.answer_weight - 1) * (batch.answer > 0))

    @torch.no_grad()
    def teacher_logits(self, batch: Batch, head: Tensor, looks: dict[int, Look] | None = None) -> Tensor:
        """Logits of rows `head` with a full cache, no Nexus rows, and positions of the text alone."""
        attend = masked(causal(batch), looks, self.guided)
        return self.student.run(attend, contiguous(batch), ids=batch.ids, head=head)

    def student_logits(self, batch: Batch, head: Tensor, looks: dict[int, Look] | None = None,
                       layers: Collection[int] | None = None) -> Tensor:  # fmt: skip
        """Logits of rows `head` of the whole dialogue, bodies of finished turns hidden."""
        attend = masked(sight(batch, self.corner).whole, looks, layers)
        nexus = self.student.embed_nexus(batch.nexus_turn, batch.nexus_slot, batch.nexus_token)
        position = torch.cat((batch.position, batch.nexus_position), 1)
        return self.student.run(attend, position, ids=batch.ids, nexus=nexus, head=head)

    def _whole(self, batch: Batch, weights: LossWeights) -> dict[str, Tensor]:
        row_weight = self.row_weights(batch)
        head = torch.nonzero(row_weight.sum(0))[:, 0]
        guided = bool(weights.attn or weights.reg)
        theirs: dict[int, Look] = {}
        ours: dict[int, Look] = {}
        found: dict[str, Tensor] = {}
        layers = None if weights.rec else self.guided
        student = self.student_logits(batch, head, ours if guided or weights.rec else None, layers)
        weight, target = row_weight[:, head].flatten(), batch.target[:, head].clamp(min=0).flatten()
        if weights.kd or weights.attn:
            teacher = self.teacher_logits(batch, head, theirs if weights.attn else None)
            found["kd"] = losses.kd(teacher.flatten(0, 1), student.flatten(0, 1), weight)
        if weights.ce:
            found["ce"] = losses.ce(student.flatten(0, 1), target, weight)
        if guided:
            found |= self._guided(batch, theirs, ours)
        if weights.rec:
            first = batch.ids.shape[1]
            found["rec"] = self._reconstructed(
                batch, {layer: (look.key[:, :, first:], look.value[:, :, first:]) for layer, look in ours.items()}
            )
        return found

    def _guided(self, batch: Batch, theirs: dict[int, Look], ours: dict[int, Look]) -> dict[str, Tensor]:
        """`attn` and `reg`, means over the guided layers."""
        turns, rows = int(batch.turn.max()) + 1, batch.ids.shape[1]
        order = torch.arange(turns, device=batch.ids.device)
        earlier = (order < batch.turn[:, :, None]) & (batch.turn > 0)[:, :, None]
        seen = sight(batch, self.corner).whole[:, :rows]
        both = torch.cat((torch.full_like(batch.turn, PAD), batch.nexus_turn), 1)
        values: dict[str, list[Tensor]] = {"attn": [], "reg": []}
        for layer in self.guided:
            look = ours[layer]
            weights = attention_weights(look.query[:, :, :rows], look.key, seen, look.scale)
            mass = losses.segment_mass(weights, both, turns)
            values["reg"].append(losses.reg(mass, earlier, self.floor))
            if layer in theirs:
                other = theirs[layer]
                full = attention_weights(other.query, other.key, causal(batch), other.scale)
                values["attn"].append(losses.attn(losses.segment_mass(full, batch.turn, turns), mass, earlier))
        return {name: torch.stack(of).mean() for name, of in values.items() if of}

    def _matched(self, batch: Batch, reconstruct: bool) -> dict[str, Tensor]:
        """`match`, a mean over layers, and `rec` from the same Nexus rows."""
        texts: dict[int, Look] = {}
        with torch.no_grad():
            self.student.run(masked(causal(batch), texts), batch.position, ids=batch.ids, head=None)
        seen, weight = sight(batch, self.corner), self.row_weights(batch)
        asked = torch.nonzero(weight.sum(0))[:, 0]
        text_seen = torch.cat((seen.text_text, seen.text_nexus), -1)[:, asked]
        nexus_seen = torch.cat((seen.nexus_text, seen.nexus_nexus), -1)
        errors: list[Tensor] = []
        rows: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(layer: int, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            text = texts.pop(layer)
            rows[layer] = key, value
            keys, values = torch.cat((text.key, key), 2), torch.cat((text.value, value), 2)
            got = attend_to(text.query[:, :, asked], keys, values, text_seen, spec.scale)
            project = self.student.output_projection(layer)
            errors.append(
                losses.match(
                    project(text.output[:, :, asked].transpose(1, 2).flatten(2)).flatten(0, 1),
                    project(got.transpose(1, 2).flatten(2)).flatten(0, 1),
                    weight[:, asked].flatten(),
                )
            )
            return attend_to(query, keys, values, nexus_seen, spec.scale)

        nexus = self.student.embed_nexus(batch.nexus_turn, batch.nexus_slot, batch.nexus_token)
        self.student.run(attend, batch.nexus_position, nexus=nexus, head=None)
        found = {"match": torch.stack(errors).mean()}
        if reconstruct:
            found["rec"] = self._reconstructed(batch, rows)
        return found

    def _reconstructed(self, batch: Batch, nexus: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """`rec`: cross-entropy of every finished body, read again where its Nexus rows end and seeing those alone."""
        seen, lengths = repeat_sight(batch), repeat_shift(batch)
        inside = (batch.turn >= 0) & (batch.turn == batch.turn.roll(-1, 1)) & (batch.target >= 0)
        inside &= seen[:, :, batch.ids.shape[1] :].any(-1)
        head = torch.nonzero(inside.sum(0))[:, 0]

        def attend(layer: int, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = nexus[layer]
            return attend_to(query, torch.cat((key, keys), 2), torch.cat((value, values), 2), seen, spec.scale)

        logits = self.student.run(attend, batch.position + lengths, ids=batch.ids, head=head)
        weight = inside[:, head].flatten().to(torch.float32)
        return losses.ce(logits.flatten(0, 1), batch.target[:, head].clamp(min=0).flatten(), weight)


def repeat_sight(batch: Batch) -> Tensor:
    """`[B,T,T+R]`: a body row sees X, its turn until itself, and its own turn's Nexus rows."""
    own = (batch.nexus_turn[:, None, :] == batch.turn[:, :, None]) & (batch.nexus_turn != PAD)[:, None, :]
    return torch.cat((sight(batch).text_text, own), -1)


def repeat_shift(batch: Batch) -> Tensor:
    """`[B,T]`: by how much positions grow when a finished body is read again after its Nexus rows."""
    same = (batch.turn[:, None, :] == batch.turn[:, :, None]).sum(-1)
    own_rows = (batch.nexus_turn[:, None, :] == batch.turn[:, :, None]) & (batch.turn >= 0)[:, :, None]
    # Spread rows have positions of their turn.
    own = (own_rows & (batch.nexus_token < 0)[:, None, :]).sum(-1)
    return torch.where(own_rows.any(-1), same + own, torch.zeros_like(own))

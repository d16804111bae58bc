"""The frozen model with Nexus rows: trained embeddings, and LoRA weights that touch no other row.

peft's LoRA acts on every row of a batch (its "activated LoRA" on all rows after a marker), and here the rows on both
sides of every Nexus run must stay the base model's to the last bit. So the layer is ours: it adds to a slice of its
output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.attention import Attend, nexus_attention, probe
from semkv_deploy.methods.sonic_adapter import NEXUS, TURN, Corner, SonicAdapter, check_base, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from semkv_deploy.train.recipe import AdapterShape


class Gate:
    """From which row on LoRA weights act: rows before `first` are the base model's; None: all rows are."""

    first: int | None = None


class GatedLinear(nn.Module):
    """A frozen linear module; on rows from `gate.first` on, `lora_b @ (lora_a @ x)` is added."""

    def __init__(self, base: nn.Linear, rank: int, gate: Gate) -> None:
        super().__init__()
        self.base, self.gate = base, gate
        make: Any = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **make) / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **make))

    def forward(self, rows: Tensor) -> Tensor:
        """`[B,S,in]` to `[B,S,out]`."""
        result: Tensor = self.base(rows)
        first = self.gate.first
        if first is None or first >= rows.shape[1]:
            return result
        added = (rows[:, first:] @ self.lora_a.T.to(rows.dtype)) @ self.lora_b.T.to(rows.dtype)
        if first == 0:
            return result + added
        return torch.cat((result[:, :first], result[:, first:] + added), 1)


class Student(nn.Module):
    """A transformers decoder, frozen, with what SONIC trains.

    Args:
        model: is changed: `close` puts its linear modules back.
        separator: the token whose embedding Nexus rows start from; None: the vocabulary's mean.
        common: tokens that spread rows begin as last; only what is exported says them.
        precision: of the frozen weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: AdapterShape,
        separator: int | None,
        seed: int = 0,
        common: tuple[int, ...] = (),
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        layers = probe(model).layers
        if any(spec.window or spec.softcap for spec in layers):
            raise SemkvError(
                "models with sliding windows or soft caps are not trained", where=type(model).__name__,
                fix="take a model of plain attention (Llama, Qwen2, Qwen3, Mistral without window)",
            )  # fmt: skip
        # An adapter knows its base by these as they are in the checkpoint, whatever it is trained beside.
        table: Any = model.get_input_embeddings().weight
        self._base_rows = table[:1024].detach().float().cpu().numpy().copy()
        self.model: Any = model.requires_grad_(False)
        self.cast(precision)
        self.shape, self.common, self.gate = shape, common, Gate()
        self.layers = len(layers)
        weight = self._table()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = weight.float().mean(0) if separator is None else weight[separator].float()
            # Equal rows would differ by position alone.
            noise = shape.noise * weight.float().std() * torch.randn(shape.k_max, weight.shape[1])
            # Spread rows differ by their tokens; what is learned is added to those.
            begin = start.cpu() + noise if shape.placement == "appended" else torch.zeros_like(noise)
            self.nexus = nn.Parameter(begin.to(weight.device))
            self.turn = nn.Parameter(torch.zeros(shape.turns_max, weight.shape[1], device=weight.device))
            self._linears = {key: self._gated(*key) for key in self._places(shape.modules)}

    def cast(self, precision: torch.dtype) -> None:
        """Changes the precision of the frozen weights."""
        # transformers' own refuses this for models that came from a GGUF.
        nn.Module.to(self.model, precision)

    def _table(self) -> Tensor:
        table: Tensor = self.model.get_input_embeddings().weight
        return table

    def _places(self, modules: Sequence[str]) -> list[tuple[int, str]]:
        return [(layer, name) for layer in range(self.layers) for name in modules]

    def _parent(self, layer: int, name: str) -> nn.Module:
        block = self.model.get_decoder().layers[layer]
        for parent in block.children():
            if isinstance(getattr(parent, name, None), nn.Linear | GatedLinear):
                found: nn.Module = parent
                return found
        raise SemkvError(
            "the model has no such linear module", where=f"adapter.modules: {name}, layer {layer}",
            got=type(self.model).__name__, fix="leave it out of the recipe's modules",
        )  # fmt: skip

    def _gated(self, layer: int, name: str) -> GatedLinear:
        parent = self._parent(layer, name)
        gated = GatedLinear(getattr(parent, name), self.shape.rank, self.gate)
        setattr(parent, name, gated)
        return gated

    def close(self) -> None:
        """Puts the model's own modules back."""
        for (layer, name), gated in self._linears.items():
            setattr(self._parent(layer, name), name, gated.base)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Of Nexus rows and turns."""
        return [self.nexus, self.turn]

    def lora_parameters(self, which: str) -> list[nn.Parameter]:
        """`lora_a` or `lora_b` of all modules."""
        return [getattr(gated, which) for gated in self._linears.values()]

    def embed_nexus(self, turn: Tensor, slot: Tensor, token: Tensor) -> Tensor:
        """`[B,R,H]` embeddings of Nexus rows of turns, slots and tokens `[B,R]`."""
        learned = self.nexus[slot] + self.turn[turn.clamp(0, self.shape.turns_max - 1)]
        return learned + self._table()[token.clamp(min=0)] * (token >= 0)[..., None]

    def output_projection(self, layer: int) -> nn.Module:
        """A layer's projection of attention outputs, as text rows have it."""
        found: nn.Module = self._parent(layer, "o_proj").o_proj  # type: ignore[assignment]
        return found.base if isinstance(found, GatedLinear) else found

    def run(
        self, attend: Attend, position: Tensor, *, ids: Tensor | None = None, nexus: Tensor | None = None, head: Any = 0
    ) -> Tensor:
        """Runs text rows `ids [B,T]`, then Nexus rows `nexus [B,R,H]`, at positions `[B,T+R]`.

        Args:
            attend: what layers do instead of attention.
            head: None returns hidden states before the head; else the rows `[n]` whose logits are wanted (0: all).

        Returns:
            `[B,T+R,H]`, or `[B,n,V]`.
        """
        parts = []
        if ids is not None:
            parts.append(self.model.get_input_embeddings()(ids))
        if nexus is not None:
            parts.append(nexus.to(parts[0].dtype if parts else self.model.dtype))
        inputs = {"inputs_embeds": torch.cat(parts, 1), "position_ids": position, "use_cache": False}
        self.gate.first = None if nexus is None else 0 if ids is None else ids.shape[1]
        try:
            if head is None:
                hidden: Tensor = self.model.get_decoder()(**inputs, semkv_attend=attend).last_hidden_state
                return hidden
            logits: Tensor = self.model(**inputs, semkv_attend=attend, logits_to_keep=head).logits
            return logits
        finally:
            self.gate.first = None

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The model's layers call `attend` inside the block."""
        with nexus_attention(self.model):
            yield

    def export(self, trained: Mapping[str, Any], corner: Corner) -> SonicAdapter:
        """What has been trained, as it is deployed."""
        tensors = {NEXUS: self.nexus, TURN: self.turn}
        for (layer, name), gated in self._linears.items():
            tensors[f"layers.{layer}.{name}.lora_A"] = gated.lora_a
            tensors[f"layers.{layer}.{name}.lora_B"] = gated.lora_b
        weight = self._table()
        return SonicAdapter(
            {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()},
            base=fingerprint(self._base_rows),
            k_max=self.shape.k_max,
            turns_max=self.shape.turns_max,
            rank=self.shape.rank if self._linears else 0,
            hidden=weight.shape[1],
            layers=self.layers,
            corner=corner,
            placement=self.shape.placement,
            common=self.common,
            trained=dict(trained),
        )

    def take(self, adapter: SonicAdapter, where: object = "adapter") -> None:
        """Continues from an adapter of the same shape.

        Raises:
            SemkvError: when it is for another base model or of another shape.
        """
        check_base(adapter, self._base_rows, self.layers, where)
        mine = self.export({}, adapter.corner)
        if adapter.placement != mine.placement:
            raise SemkvError(
                "the adapter's Nexus rows stand elsewhere than the recipe's", where=where, expected=mine.placement,
                got=adapter.placement, fix=f"set adapter.placement to {adapter.placement}",
            )  # fmt: skip
        if adapter.common != mine.common:
            raise SemkvError(
                "the adapter's Nexus rows begin as other tokens than the recipe's", where=where,
                expected=f"{len(mine.common)} common tokens of the recipe's data",
                got=f"{len(adapter.common)} of which some differ", fix="take the recipe and data it was trained with",
            )  # fmt: skip
        here, there = ({name: tensor.shape for name, tensor in of.tensors.items()} for of in (mine, adapter))
        if here != there:
            differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise SemkvError(
                "the adapter has another shape than the recipe's", where=where, expected=here.get(differ[0]),
                got=f"{differ[0]} {there.get(differ[0])}", fix="set adapter.k_max, turns_max, rank and modules to its",
            )  # fmt: skip
        with torch.no_grad():
            self.nexus.copy_(torch.from_numpy(adapter.tensors[NEXUS]))
            self.turn.copy_(torch.from_numpy(adapter.tensors[TURN]))
            for (layer, name), gated in self._linears.items():
                a, b = adapter.lora(layer, name)
                gated.lora_a.copy_(torch.from_numpy(a))
                gated.lora_b.copy_(torch.from_numpy(b))

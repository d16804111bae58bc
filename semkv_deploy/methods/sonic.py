"""SONIC (arXiv 2601.21927): a finished turn becomes a few learned Nexus tokens, and its own tokens leave the cache.

The paper gives the idea; what is here is our completion (`sonic_adapter` has what is learned). When a turn is over, K
Nexus rows are appended behind it as a prompt is. They see the whole turn, what is kept of earlier ones, and the Nexus
rows before them; then the turn's tokens are dropped, with `CompactCache`. Nexus rows see each other causally, so that
the first K rows of a turn are the same whatever K is: one adapter serves every budget. A spread adapter's rows begin as
tokens of the turn, at those tokens' positions; an appended one's have positions of their own, which follow.

Ids of Nexus rows lie beyond the vocabulary. The decoder tells them apart by that alone: their embeddings come from a
table of their own, and LoRA weights act on them and on no other row (`sonic_decoder`). Logits have no entry for them,
so that none is ever chosen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import text
from semkv_deploy.methods.base import Method, State
from semkv_deploy.methods.behaviours import NexusTurns
from semkv_deploy.methods.layout import COMPRESS, DECODE, TOKEN, TURN
from semkv_deploy.methods.sonic_adapter import SonicAdapter, load_adapter
from semkv_deploy.model.spread import Placement
from semkv_deploy.ops import compact_cache

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import Tensor
    from typing_extensions import Self

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import Settings
    from semkv_deploy.methods.layout import CacheLayout
    from semkv_deploy.model.config import ModelFacts

_WHERE = "--method sonic"


class Sonic(Method):
    """Keeps a few Nexus rows of each finished turn.

    Attributes:
        adapter: file that `semkv-deploy train` wrote. A manifest has its name only: the weights are in the graphs.
        adapter_sha256: of that file; found by itself.
        kept: slots that a turn keeps, as a share of its tokens, rounded up; None: the budget.
        tokens: slots that a turn keeps, whatever its length; 0: by `kept`.
        nexus_share: of these slots, how many are Nexus rows (rounded up); the others are the turn's last tokens.
        compress_at: "full": as the next turn begins, so that a turn can be undone until then; "turn": as it ends, while
            nobody waits.
        k_max, turns_max, placement: the adapter's most Nexus rows of a turn, turns that differ, and where rows stand;
            found by themselves.
    """

    kind: Literal["sonic"] = "sonic"
    adapter: str | None = None
    adapter_sha256: str = ""
    kept: float | None = Field(default=None, gt=0, le=1)
    tokens: int = Field(default=0, ge=0)
    nexus_share: float = Field(default=1.0, gt=0, le=1)
    k_max: int = Field(default=0, ge=0)
    turns_max: int = Field(default=0, ge=0)
    placement: Placement = "appended"

    learned: ClassVar[bool] = True

    _loaded: SonicAdapter | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _identify(cls, given: Any) -> Any:
        """Adds the SHA-256 of a file, so that what is measured or built with one adapter is not taken for another's."""
        if isinstance(given, dict) and given.get("adapter") is not None and not given.get("adapter_sha256"):
            try:
                content = Path(given["adapter"]).read_bytes()
            except OSError as error:
                raise SemkvError(
                    "the adapter cannot be read", where=given["adapter"], got=error.strerror, fix="give a file's path"
                ) from None
            return {**given, "adapter": str(given["adapter"]), "adapter_sha256": hashlib.sha256(content).hexdigest()}
        return given

    def resolve(self, model: ModelFacts) -> Self:
        """Reads the adapter.

        Raises:
            SemkvError: when there is none, it is not for such a model or for fewer rows than are asked for, or the
                model has sliding windows.
        """
        if self.adapter is None:
            raise SemkvError(
                "sonic needs an adapter",
                where=_WHERE,
                expected="--method-option adapter=FILE",
                fix="give one that was trained for this model, or train one: semkv-deploy train",
            )
        if any(model.windows):
            raise SemkvError(
                "sonic takes tokens from the middle, which a sliding window does not allow",
                where=_WHERE,
                fix="use streaming-llm",
            )
        adapter = load_adapter(Path(self.adapter))
        self._check(adapter, model)
        own = {name: getattr(adapter, name) for name in ("k_max", "turns_max", "placement")}
        resolved = self.model_copy(update={"adapter": Path(self.adapter).name, **own})
        resolved._loaded = adapter
        return resolved

    def _check(self, adapter: SonicAdapter, model: ModelFacts) -> None:
        if adapter.corner == "full":
            raise SemkvError(
                "the adapter was trained with Nexus rows that all see each other, which no decoder graph here does",
                where=self.adapter,
                expected="corner causal",
                got="corner full",
                fix="train it with corner: causal",
            )
        if max(adapter.common, default=0) >= model.vocab_size:
            raise SemkvError(
                "the adapter is for another base model: it names tokens beyond the vocabulary",
                where=self.adapter,
                expected=f"ids below {model.vocab_size}",
                got=max(adapter.common),
                fix="take the adapter that was trained for this model",
            )
        for what, expected, got in (
            ("hidden size", adapter.hidden, model.hidden_size),
            ("number of layers", adapter.layers, model.layers),
        ):
            if expected != got:
                raise SemkvError(
                    f"the adapter is for another base model: its {what} differs",
                    where=self.adapter,
                    expected=expected,
                    got=got,
                    fix="take the adapter that was trained for this model",
                )
        rows = math.ceil(self.nexus_share * self.tokens)
        if rows > adapter.k_max:
            raise SemkvError(
                "the adapter has fewer Nexus rows than are asked for",
                where="--method-option tokens",
                expected=f"at most {adapter.k_max}",
                got=rows,
                fix="ask for fewer, or train one with a larger k_max",
            )

    @property
    def more_columns(self) -> tuple[str, ...]:
        return (TURN.name, TOKEN.name) if self.placement == "spread" else (TURN.name,)

    @property
    def loaded(self) -> SonicAdapter:
        """The adapter.

        Raises:
            SemkvError: for a method that was not resolved: one of a manifest has the adapter in its graphs.
        """
        if self._loaded is None:
            raise SemkvError("the adapter was not loaded", where=self.adapter or _WHERE, fix="build from its file")
        return self._loaded

    def rewrite_decoder(self, decoder: ir.Model, layout: CacheLayout) -> None:
        from semkv_deploy.methods.sonic_decoder import add_adapter

        add_adapter(decoder, self.loaded, where=self.adapter)

    def rewritten(self, model: Any) -> AbstractContextManager[None]:
        from semkv_deploy.methods.sonic_reference import with_adapter

        return with_adapter(model, self.loaded)

    def compressor(self, model: ModelFacts) -> onnx.ModelProto:
        more = dict.fromkeys(("keep_index", *self.more_columns), "int64[batch,1,capacity]")
        return text.parse_compressor(
            model,
            cluster_groups=1,
            inputs=tuple(more),
            operators=("CompactCache",),
            more=more,
            outputs=(*text.COMPRESSED, *(f"{name}_out" for name in self.more_columns)),
            body=f"""
            zero = Constant <value = int64 {{0}}> ()
            minus_one = Constant <value = int64 {{-1}}> ()
            key_cache_out, value_cache_out, slot_bias_out, length_out =
                semkv.CompactCache (key_cache, value_cache, slot_bias, keep_index)
            final_index = Identity (keep_index)
            {text.MOVE_METADATA}
            {"".join(map(text.move_column, self.more_columns))}
            evicted = Sub (length, length_out)
            some = Greater (evicted, zero)
            level = Where (some, zero, minus_one)
            """,
        )

    def warnings(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[str]:
        if profile.budget == 1 and (self.kept is not None or self.tokens):
            return ["a budget of 1 keeps every token: kept and tokens say nothing there"]
        return []

    def behaviours(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[Behaviour]:
        if profile.budget == 1:
            return []
        return [
            NexusTurns(
                program=COMPRESS,
                decoder=DECODE,
                when="turn" if self.compress_at == "turn" else "begin",
                first_id=model.vocab_size,
                placement=self.placement,
                common=self._loaded.common if self._loaded is not None else (),
                most=self.k_max,
                turns=self.turns_max,
                kept=self.kept if self.kept is not None else profile.budget,
                tokens=self.tokens,
                nexus_share=self.nexus_share,
                sinks=self.sinks,
                keep_slots=tuple(group.keep_slots for group in profile.groups),
            )
        ]

    def reference(self, program: str) -> Callable[..., State]:
        return {COMPRESS: partial(_drop, self.more_columns)}[program]


def _drop(columns: tuple[str, ...], model: ModelFacts, state: State, *, keep_index: Tensor, **_: Any) -> State:
    import torch

    key, value, bias, length = compact_cache.reference(
        state["key_cache"], state["value_cache"], state["slot_bias"], keep_index
    )
    moved = {
        name: state[name].gather(2, keep_index.clamp_min(0)).masked_fill(keep_index < 0, 0)
        for name in ("slot_position", "slot_chunk", *columns)
    }
    evicted = state["length"] - length
    after = {"key_cache": key, "value_cache": value, "slot_bias": bias, "length": length, **moved}
    return {**after, "level": torch.where(evicted > 0, 0, -1), "evicted": evicted}

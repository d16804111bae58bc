"""DynSplit-KV (Ye et al., arXiv 2602.03184): semantic blocks, cut where a delimiter weighs most; blocks stay or go.

The paper splits dynamically (DD-Select, `dd_select` and `model.blocks`) and selects whole blocks; it has no code, and
what we could not read of it is our completion, marked where it is. Here blocks are kept by importance when the cache is
full or a turn ends, and the rest leaves: a block's score is that of its slots, which is how much they are looked at
when the context is read again (`queries=repeat`, KVzip's score) or a prediction of it (`queries=predicted`), as in
`importance`. Sinks and a recent window always stay; the last block that fits is cut, its newest slots stay, so that the
budget is used. `blocks=fixed` and `blocks=delimiters` are the rigid splittings that the paper compares with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.base import State
from semkv_deploy.methods.behaviours import Blocks
from semkv_deploy.methods.block_scores import Pool, pool_blocks, pool_text
from semkv_deploy.methods.calibration import Settings
from semkv_deploy.methods.dd_select import DelimiterTable, Regions, delimiter_table
from semkv_deploy.methods.importance import Importance
from semkv_deploy.methods.importance_prediction import ScoreWeights
from semkv_deploy.model.blocks import UNIT, DomainWeights

if TYPE_CHECKING:
    from torch import Tensor

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import CalibrationText
    from semkv_deploy.model.config import ModelFacts

BLOCK = "slot_block"
"""The slot column of block numbers."""


class DynSplitSettings(Settings):
    """What calibration gave.

    Attributes:
        table: weights of delimiters; None for blocks that are cut without.
        scores: how importance is predicted; None where it is measured.
    """

    table: DelimiterTable | None
    scores: ScoreWeights | None


class DynSplit(Importance):
    """Keeps the semantic blocks of the highest importance, each KV head its own.

    Attributes:
        blocks: where blocks end: "dynamic", at the delimiter of the largest weight near `block`; "delimiters", at the
            delimiter that is nearest; "fixed", after `block` tokens.
        block: tokens of a block where no delimiter says otherwise (the paper's C).
        search: how far from it a boundary is looked for (the paper's delta); None: a quarter of `block`.
        nearness: standard deviations of weight that a boundary loses at the end of the window; 0: the paper's argmax.
        domain: whose weights count, of those it is calibrated on; "auto": the domain to which the delimiters so far are
            likeliest.
        pool: a block's score: the largest of its slots', or their mean.
        retained, future, alpha: regions of DD-Select; see `dd_select`.
    """

    kind: Literal["dynsplit"] = "dynsplit"  # type: ignore[assignment]
    blocks: Literal["dynamic", "delimiters", "fixed"] = "dynamic"
    block: int = Field(default=16, ge=4, le=64)
    search: int | None = Field(default=None, ge=0, le=16)
    nearness: float = Field(default=0.5, ge=0, le=8)
    domain: str = "auto"
    pool: Pool = "mean"
    retained: int = Field(default=32, ge=1, le=256)
    future: int = Field(default=16, ge=1, le=256)
    alpha: float = Field(default=1.0, ge=0, le=100)

    more_columns: ClassVar[tuple[str, ...]] = (BLOCK,)

    @model_validator(mode="after")
    def _bounded(self) -> DynSplit:
        if 4 * self.radius > self.block:
            raise ValueError(f"search is at most a quarter of block, {self.block // 4}")
        return self

    @property
    def radius(self) -> int:
        """How far from `block` a boundary is looked for."""
        if self.blocks == "fixed":
            return 0
        return self.block // 4 if self.search is None else self.search

    @property
    def reads_domains(self) -> bool:
        return self.blocks == "dynamic"

    @property
    def regions(self) -> Regions:
        """Of DD-Select."""
        return Regions(self.retained, self.future, self.alpha)

    def check_domains(self, names: Sequence[str]) -> None:
        if self.domain not in ("auto", *names):
            raise SemkvError(
                "no weights for the domain",
                where=f"--method-option domain={self.domain}",
                expected=" or ".join(names),
                fix="calibrate on a text of it: semkv-deploy calibrate --text DOMAIN=FILE",
            )

    @property
    def pool_text(self) -> str:
        return pool_text(self.pool, self.block + self.radius)

    def pool_scores(self, score: Tensor, state: State) -> Tensor:
        return pool_blocks(score, state[BLOCK], state["length"], self.pool)

    @property
    def recent_least(self) -> int:
        # The open block's slots are not to be told apart from one another.
        return max(super().recent_least, self.block + self.radius)

    def calibrate(self, model: ModelFacts, text: CalibrationText) -> DynSplitSettings:
        scores = super().calibrate(model, text)
        assert scores is None or isinstance(scores, ScoreWeights)
        table = None
        if self.reads_domains:
            table = text.known or delimiter_table(text.domains, self.regions, model.vocab_size)
        return DynSplitSettings(table=table, scores=scores)

    def group_inputs(
        self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None
    ) -> dict[str, tuple[Any, ...]]:
        return super().group_inputs(
            model, profile, settings.scores if isinstance(settings, DynSplitSettings) else settings
        )

    def behaviours(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[Behaviour]:
        behaviours = super().behaviours(model, profile, settings)
        return [self._rule(model, settings), *behaviours] if behaviours else []

    def _rule(self, model: ModelFacts, settings: Settings | None) -> Blocks:
        """Where blocks end. Without calibration all delimiters weigh the same."""
        table = settings.table if isinstance(settings, DynSplitSettings) else None
        domains: tuple[DomainWeights, ...] = ()
        token_ids: tuple[int, ...] = ()
        number = None
        if self.blocks == "dynamic" and table is not None:
            token_ids, domains = table.token_ids, table.domains
            if self.domain != "auto":
                number = [domain.name for domain in domains].index(self.domain)
        elif self.blocks != "fixed":
            domains = (DomainWeights(name="any", weights=(0,), log_shares=(0,)),)
        return Blocks(
            column=BLOCK,
            base=self.block,
            search=self.radius,
            nearness=round(UNIT * self.nearness) if self.blocks == "dynamic" else 0,
            turn_ids=tuple(sorted(model.eos_token_ids)) if self.blocks == "dynamic" else (),
            token_ids=token_ids,
            domains=domains,
            domain=number,
        )

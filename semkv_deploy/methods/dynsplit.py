"""DynSplit-KV (Ye et al., arXiv 2602.03184): semantic blocks, cut where a delimiter weighs most; blocks stay or go.

The paper splits dynamically (DD-Select, `dd_select` and `model.blocks`) and selects whole blocks; it has no code, and
what we could not read of it is our completion, marked where it is. Here blocks are kept by importance when the cache is
full or a turn ends, and the rest leaves: a block's score is that of its slots, which is how much they are looked at
when the context is read again (`queries=repeat`, KVzip's score) or a prediction of it (`queries=predicted`), as in
`importance`. Sinks and a recent window always stay; the last block that fits is cut, its newest slots stay, so that the
budget is used. `blocks=fixed` and `blocks=delimiters` are the rigid splittings that the paper compares with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from semkv_deploy.methods.base import State
from semkv_deploy.methods.behaviours import Blocks
from semkv_deploy.methods.block_scores import Pool, pool_blocks, pool_text
from semkv_deploy.methods.importance import Fit, Importance
from semkv_deploy.methods.importance_prediction import ScoreWeights
from semkv_deploy.methods.semantic_blocks import DynSplitSettings, SemanticBlocks

if TYPE_CHECKING:
    from torch import Tensor

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.choices import BudgetBy
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import CalibrationText, Settings
    from semkv_deploy.model.config import ModelFacts

BLOCK = "slot_block"
"""The slot column of block numbers."""


class DynSplit(SemanticBlocks, Importance):
    """Keeps the semantic blocks of the highest importance, each KV head its own.

    Attributes:
        pool: a block's score: the largest of its slots', or their mean.
    """

    kind: Literal["dynsplit"] = "dynsplit"  # type: ignore[assignment]
    pool: Pool = "mean"
    fit: Literal["auto"] | Fit = "none"
    more_columns: ClassVar[tuple[str, ...]] = (BLOCK,)

    @property
    def budget_by(self) -> BudgetBy:
        return "uniform"

    @property
    def pool_text(self) -> str:
        return pool_text(self.pool, self.longest)

    def pool_scores(self, score: Tensor, state: State) -> Tensor:
        return pool_blocks(score, state[BLOCK], state["length"], self.pool)

    @property
    def recent_least(self) -> int:
        # The open block's slots are not to be told apart from one another.
        return max(super().recent_least, self.longest)

    def calibrate(self, model: ModelFacts, text: CalibrationText) -> DynSplitSettings:
        scores = super().calibrate(model, text)
        assert scores is None or isinstance(scores, ScoreWeights)
        return DynSplitSettings(table=self.table(model, text), scores=scores)

    def group_inputs(
        self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None
    ) -> dict[str, tuple[Any, ...]]:
        scores = settings.scores if isinstance(settings, DynSplitSettings) else settings
        return super().group_inputs(model, profile, scores)

    def behaviours(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[Behaviour]:
        behaviours = super().behaviours(model, profile, settings)
        return [Blocks(column=BLOCK, **self.rule(model, settings)), *behaviours] if behaviours else []

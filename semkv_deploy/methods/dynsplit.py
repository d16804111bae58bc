"""DynSplit-KV (Ye et al., arXiv 2602.03184): semantic blocks, cut where a delimiter weighs most; blocks stay or go.

The paper splits dynamically (DD-Select, `dd_select` and `model.blocks`) and selects whole blocks; it has no code, and
what we could not read of it is our completion, marked where it is. Here blocks are kept by importance when the cache is
full or a turn ends, and the rest leaves: a block's score is that of its slots, which is how much they are looked at
when the context is read again (`queries=repeat`, KVzip's score) or a prediction of it (`queries=predicted`), as in
`importance`. Sinks and a recent window always stay; the last block that fits is cut, its newest slots stay, so that the
budget is used. `blocks=fixed` and `blocks=delimiters` are the rigid splittings that the paper compares with.

With `attend` a step attends to the best of the blocks that stayed, as in `dynsplit-select`. Heads kept other blocks, so
each has a table of its own; remains of blocks that were cut are joined with what is beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from semkv_deploy.methods.base import State
from semkv_deploy.methods.behaviours import Blocks, SlotTables
from semkv_deploy.methods.block_scores import Pool, pool_blocks, pool_text
from semkv_deploy.methods.block_tables import Tables, most_joined
from semkv_deploy.methods.importance import Fit, Importance
from semkv_deploy.methods.importance_prediction import ScoreWeights
from semkv_deploy.methods.layout import DECODE, Binding, CacheLayout, Program, Scope
from semkv_deploy.methods.representatives import BLOCK_END, BLOCKS, CLOSED, MAP_BLOCKS, REPRESENTATIVES, Kind
from semkv_deploy.methods.semantic_blocks import DynSplitSettings, SemanticBlocks

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.choices import BudgetBy
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import CalibrationText, Settings
    from semkv_deploy.model.cache_groups import CacheGroup
    from semkv_deploy.model.config import ModelFacts

BLOCK = "slot_block"
"""The slot column of block numbers."""


class DynSplit(SemanticBlocks, Importance):
    """Keeps the semantic blocks of the highest importance, each KV head its own.

    Attributes:
        pool: a block's score: the largest of its slots', their mean, or the logarithm of their mean attention ("mass").
        attend: slots that a step attends to beside its own, in each KV head; None: to all that stayed.
        representatives, recent_blocks: as in `dynsplit-select`; they count where `attend` is given.
    """

    kind: Literal["dynsplit"] = "dynsplit"  # type: ignore[assignment]
    pool: Pool = "mean"
    fit: Literal["auto"] | Fit = "none"
    attend: int | None = Field(default=None, ge=16, le=1 << 16)
    representatives: Kind = "min_max"
    recent_blocks: int = Field(default=4, ge=1, le=64)

    @property
    def more_columns(self) -> tuple[str, ...]:
        return (BLOCK,)

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
        if not behaviours and not self.selects:
            return []
        numbered = [Blocks(column=BLOCK, **self.rule(model, settings)), *behaviours]
        if not self.selects:
            return numbered
        tables = SlotTables(
            program=MAP_BLOCKS,
            input=BLOCK_END,
            column=BLOCK,
            join=self.block,
            most=self.most_blocks(profile.groups),
            closed=self.most_closed(profile),
        )
        return [*numbered, tables]

    # What a step chooses of what stayed.

    @property
    def selects(self) -> bool:
        return self.attend is not None

    @property
    def tables(self) -> Tables:
        """How blocks are tabled and chosen."""
        assert self.attend is not None
        return Tables(self.attend, self.representatives, self.longest, self.recent_blocks, by_head=True)

    def most_blocks(self, groups: Sequence[CacheGroup]) -> int:
        """N: of a head, one that is none's included."""
        return most_joined(groups, self.block)

    def most_closed(self, profile: BudgetProfile) -> int:
        """M: blocks of a head that one run maps: those that a piece of a prompt closes."""
        return -(-profile.prefill_chunk // (self.block - self.radius)) + 1

    def table_elements(self, head_dim: int, group: CacheGroup) -> int:
        return self.tables.elements(head_dim, group, self.most_blocks((group,))) if self.selects else 0

    def read_elements(self, head_dim: int, group: CacheGroup) -> int:
        if not self.selects:
            return super().read_elements(head_dim, group)
        return self.tables.read_elements(head_dim, group, self.most_blocks((group,)))

    def symbols(self, profile: BudgetProfile) -> dict[str, int]:
        if not self.selects:
            return super().symbols(profile)
        return {BLOCKS: self.most_blocks(profile.groups), CLOSED: self.most_closed(profile)}

    def layout(self, model: ModelFacts, groups: Sequence[CacheGroup]) -> CacheLayout:
        layout = super().layout(model, groups)
        return self.tables.extended(layout, model.head_dim, self.most_blocks(groups)) if self.selects else layout

    def rewrite_decoder(self, decoder: ir.Model, layout: CacheLayout) -> None:
        super().rewrite_decoder(decoder, layout)
        if self.selects:
            self.tables.rewrite(decoder)

    def bindings(self, program: str, layout: CacheLayout) -> tuple[Scope, dict[str, Binding]]:
        if program == MAP_BLOCKS:
            return self.tables.bindings()
        scope, bound = super().bindings(program, layout)
        return scope, bound if program == DECODE else {
            name: binding for name, binding in bound.items() if name != REPRESENTATIVES
        }

    def programs(self, model: ModelFacts, layout: CacheLayout) -> list[Program]:
        return [*super().programs(model, layout), *(self.tables.programs(model, layout) if self.selects else [])]

    def reference(self, program: str) -> Callable[..., State]:
        return self.tables.reference() if self.selects and program == MAP_BLOCKS else super().reference(program)

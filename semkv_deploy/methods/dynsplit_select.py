"""DynSplit-KV (Ye et al., arXiv 2602.03184) as selection: the whole cache stays, a step attends to its best blocks.

A closed block has representatives, whatever its length: the smallest and largest value of each channel of its keys
(Quest's, arXiv 2406.10774), or their mean, with or without radii (`representatives`). In a step each KV head scores all
blocks by its queries and attends to the best, `attend` slots in all; the first block and the recent ones, the open one
among them, are always among these.
Prompts attend to everything. What is ours of it is said in `SemanticBlockMap` and `SemanticBlockSelect`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from semkv_deploy.methods.base import State
from semkv_deploy.methods.behaviours import BlockTables
from semkv_deploy.methods.block_tables import Tables
from semkv_deploy.methods.layout import Binding, CacheLayout, Program, Scope
from semkv_deploy.methods.representatives import BLOCK_END, BLOCKS, CLOSED, MAP_BLOCKS, Kind, require_uniform
from semkv_deploy.methods.semantic_blocks import DynSplitSettings, SemanticBlocks

if TYPE_CHECKING:
    import onnx_ir as ir

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import CalibrationText, Settings
    from semkv_deploy.model.cache_groups import CacheGroup
    from semkv_deploy.model.config import ModelFacts


class DynSplitSelect(SemanticBlocks):
    """Attends to the best blocks of a whole cache.

    Attributes:
        attend: slots that a step attends to beside its own, in each KV head.
        representatives: what blocks are scored by: "min_max", "mean_radius" (a bound as well, of little more than half
            the bytes) or "mean".
        recent_blocks: blocks at the end that are always attended to, the open one included.
    """

    kind: Literal["dynsplit-select"] = "dynsplit-select"
    attend: int = Field(default=1024, ge=16, le=1 << 16)
    representatives: Kind = "min_max"
    recent_blocks: int = Field(default=4, ge=1, le=64)

    compresses: ClassVar[bool] = False

    @property
    def selects(self) -> bool:
        return True

    def most_blocks(self, groups: Sequence[CacheGroup]) -> int:
        """N: as many as a whole cache has, one that is open, and one that is none."""
        require_uniform({group.capacity for group in groups})
        return -(-groups[0].capacity // (self.block - self.radius)) + 2

    def most_closed(self, profile: BudgetProfile) -> int:
        """M: blocks that one run closes at most."""
        return -(-profile.prefill_chunk // (self.block - self.radius)) + 1

    @property
    def tables(self) -> Tables:
        """How blocks are tabled and chosen."""
        return Tables(self.attend, self.representatives, self.longest, self.recent_blocks)

    def table_elements(self, head_dim: int, group: CacheGroup) -> int:
        return self.tables.elements(head_dim, group, self.most_blocks((group,)))

    def read_elements(self, head_dim: int, group: CacheGroup) -> int:
        return self.tables.read_elements(head_dim, group, self.most_blocks((group,)))

    def symbols(self, profile: BudgetProfile) -> dict[str, int]:
        return {BLOCKS: self.most_blocks(profile.groups), CLOSED: self.most_closed(profile)}

    def layout(self, model: ModelFacts, groups: Sequence[CacheGroup]) -> CacheLayout:
        layout = super().layout(model, groups)
        return self.tables.extended(layout, model.head_dim, self.most_blocks(layout.groups))

    def rewrite_decoder(self, decoder: ir.Model, layout: CacheLayout) -> None:
        self.tables.rewrite(decoder)

    def bindings(self, program: str, layout: CacheLayout) -> tuple[Scope, dict[str, Binding]]:
        return self.tables.bindings() if program == MAP_BLOCKS else super().bindings(program, layout)

    def programs(self, model: ModelFacts, layout: CacheLayout) -> list[Program]:
        return self.tables.programs(model, layout)

    def reference(self, program: str) -> Callable[..., State]:
        return {MAP_BLOCKS: self.tables.reference()}[program]

    def calibrate(self, model: ModelFacts, text: CalibrationText) -> DynSplitSettings:
        return DynSplitSettings(table=self.table(model, text), scores=None)

    def behaviours(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[Behaviour]:
        most = self.most_blocks(profile.groups)
        return [
            BlockTables(
                program=MAP_BLOCKS,
                input=BLOCK_END,
                most=most,
                closed=self.most_closed(profile),
                **self.rule(model, settings),
            )
        ]

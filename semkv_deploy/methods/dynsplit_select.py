"""DynSplit-KV (Ye et al., arXiv 2602.03184) as selection: the whole cache stays, a step attends to its best blocks.

A closed block has representatives, whatever its length: the smallest and largest value of each channel of its keys
(Quest's, arXiv 2406.10774), or their mean, with or without radii (`representatives`). In a step each KV head scores all
blocks by its queries and attends to the best, `attend` slots in all; the first block and the recent ones, the open one
among them, are always among these.
Prompts attend to everything. What is ours of it is said in `SemanticBlockMap` and `SemanticBlockSelect`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from semkv_deploy.methods.base import State
from semkv_deploy.methods.behaviours import BlockTables
from semkv_deploy.methods.layout import Binding, Buffer, CacheLayout, Program, Scope
from semkv_deploy.methods.representatives import (
    BLOCK_END,
    BLOCKS,
    CLOSED,
    MAP_BLOCKS,
    REPRESENTATIVES,
    Kind,
    map_reference,
    require_uniform,
    table_size,
)
from semkv_deploy.methods.semantic_blocks import DynSplitSettings, SemanticBlocks

if TYPE_CHECKING:
    import onnx
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

    def table_elements(self, head_dim: int, group: CacheGroup) -> int:
        vectors, size = table_size(self.representatives, head_dim)
        return len(group.heads) * self.most_blocks((group,)) * vectors * size

    def read_elements(self, head_dim: int, group: CacheGroup) -> int:
        rows = 2 * len(group.heads) * min(self.attend, group.capacity) * head_dim
        return rows + self.table_elements(head_dim, group)

    def symbols(self, profile: BudgetProfile) -> dict[str, int]:
        return {BLOCKS: self.most_blocks(profile.groups), CLOSED: self.most_closed(profile)}

    def layout(self, model: ModelFacts, groups: Sequence[CacheGroup]) -> CacheLayout:
        layout = super().layout(model, groups)
        most = self.most_blocks(layout.groups)
        vectors, size = table_size(self.representatives, model.head_dim)
        table = Buffer(name=REPRESENTATIVES, shape=f"B,Hkv,{most},{vectors},{size}", dtype="T")
        ends = Buffer(name=BLOCK_END, shape=f"B,{most}", dtype="int64")
        return layout.model_copy(update={"buffers": (*layout.buffers, table), "step_inputs": (ends,)})

    def rewrite_decoder(self, decoder: ir.Model, layout: CacheLayout) -> None:
        from semkv_deploy.methods.select_blocks import select_blocks

        select_blocks(
            decoder,
            longest=self.longest,
            width=self.attend,
            kind=self.representatives,
            first=1,
            recent=self.recent_blocks,
        )

    def bindings(self, program: str, layout: CacheLayout) -> tuple[Scope, dict[str, Binding]]:
        if program != MAP_BLOCKS:
            return super().bindings(program, layout)
        return "group", {
            "key": Binding(input="key_cache", output=None),
            REPRESENTATIVES: Binding(input=REPRESENTATIVES, output=f"{REPRESENTATIVES}_out"),
        }

    def programs(self, model: ModelFacts, layout: CacheLayout) -> list[Program]:
        from semkv_deploy.methods.select_blocks import map_program

        def graph(heads: int) -> onnx.ModelProto:
            of_heads = model.model_copy(update={"kv_heads": heads})
            return map_program(of_heads, longest=self.longest, kind=self.representatives)

        in_place = {REPRESENTATIVES: f"{REPRESENTATIVES}_out"}
        return [Program(MAP_BLOCKS, graph(heads), "group", numbers, in_place) for heads, numbers in layout.by_heads()]

    def reference(self, program: str) -> Callable[..., State]:
        def map_blocks(model: ModelFacts, state: State, **blocks: Any) -> State:
            return map_reference(self.representatives, self.longest, state, **blocks)

        return {MAP_BLOCKS: map_blocks}[program]

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

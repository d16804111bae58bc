"""What methods share whose steps attend to chosen blocks: sizes of their tables, buffers, graphs and bindings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from semkv_deploy.methods.layout import Binding, Buffer, CacheLayout, Program, Scope
from semkv_deploy.methods.representatives import (
    BLOCK_END,
    MAP_BLOCKS,
    REPRESENTATIVES,
    Kind,
    map_reference,
    table_size,
)

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from semkv_deploy.methods.base import State
    from semkv_deploy.model.cache_groups import CacheGroup
    from semkv_deploy.model.config import ModelFacts


class Tables(NamedTuple):
    """How blocks are tabled and chosen.

    Attributes:
        width: slots that a step attends to beside its own.
        kind: of representatives.
        longest: slots of a block at most.
        recent: blocks at the end that are always attended to; the first is as well.
        by_head: each KV head has blocks of its own.
    """

    width: int
    kind: Kind
    longest: int
    recent: int
    by_head: bool = False

    def elements(self, head_dim: int, group: CacheGroup, most: int) -> int:
        """Elements of a group's representatives, with room for `most` blocks."""
        vectors, size = table_size(self.kind, head_dim)
        return len(group.heads) * most * vectors * size

    def read_elements(self, head_dim: int, group: CacheGroup, most: int) -> int:
        """Elements that a step reads of a group that is full."""
        rows = 2 * len(group.heads) * min(self.width, group.capacity) * head_dim
        return rows + self.elements(head_dim, group, most)

    def extended(self, layout: CacheLayout, head_dim: int, most: int) -> CacheLayout:
        """A layout with the table and the decoder's input more."""
        vectors, size = table_size(self.kind, head_dim)
        table = Buffer(name=REPRESENTATIVES, shape=f"B,Hkv,{most},{vectors},{size}", dtype="T")
        heads = f"{sum(len(group.heads) for group in layout.groups)}," if self.by_head else ""
        ends = Buffer(name=BLOCK_END, shape=f"B,{heads}{most}", dtype="int64")
        more = {"buffers": (*layout.buffers, table), "step_inputs": (*layout.step_inputs, ends)}
        return layout.model_copy(update=more)

    def rewrite(self, decoder: ir.Model) -> None:
        """Lets a portable decoder choose blocks."""
        from semkv_deploy.methods.select_blocks import select_blocks

        select_blocks(
            decoder,
            longest=self.longest,
            width=self.width,
            kind=self.kind,
            first=1,
            recent=self.recent,
            by_head=self.by_head,
        )

    def bindings(self) -> tuple[Scope, dict[str, Binding]]:
        """Of the program that maps blocks."""
        return "group", {
            "key": Binding(input="key_cache", output=None),
            REPRESENTATIVES: Binding(input=REPRESENTATIVES, output=f"{REPRESENTATIVES}_out"),
        }

    def programs(self, model: ModelFacts, layout: CacheLayout) -> list[Program]:
        """The program that maps blocks, once for each number of heads that groups have."""
        from semkv_deploy.methods.map_blocks import map_program

        def graph(heads: int) -> onnx.ModelProto:
            of_heads = model.model_copy(update={"kv_heads": heads})
            return map_program(of_heads, longest=self.longest, kind=self.kind, by_head=self.by_head)

        in_place = {REPRESENTATIVES: f"{REPRESENTATIVES}_out"}
        return [Program(MAP_BLOCKS, graph(heads), "group", numbers, in_place) for heads, numbers in layout.by_heads()]

    def reference(self) -> Callable[..., State]:
        """What that program computes."""

        def map_blocks(model: ModelFacts, state: State, **blocks: Any) -> State:
            return map_reference(self.kind, self.longest, state, **blocks)

        return map_blocks


def most_joined(groups: Sequence[CacheGroup], join: int) -> int:
    """Blocks of a head at most where remains are joined: of two neighbours one has more than half of `join` slots.

    Two neighbours together have more than `join`; beside them the last block, and a row that is none's.
    """
    return 2 * (max(group.capacity for group in groups) // (join + 1)) + 3

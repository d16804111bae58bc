"""What a method keeps for a conversation: named buffers, and the graphs (programs) that read and write them.

Shapes are text in the dimension names of the operators' contracts: `B` batch rows, `Hkv` KV heads of the group, `C`
slots of the group, `D` head size; a number stands for itself. Element type "T" is the cache's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.model import names
from semkv_deploy.model.cache_groups import CacheGroup

if TYPE_CHECKING:
    import onnx

Scope = Literal["cache", "group"]
"""A run of a program takes every group's buffers (the decoder), or those of one group."""

DECODE, COMPRESS = "decode", "compress"
"""Names of the programs that every bundle, and every bundle that compresses, has."""


class Buffer(BaseModel):
    """Memory that a host allocates for every cache group and binds by name.

    Attributes:
        name: such as key, value, slot_bias.
        shape: dimension names, comma-separated.
        dtype: "T" (the cache's element type), "float32" or "int64".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: str
    dtype: str

    @property
    def has_slots(self) -> bool:
        """Whether it holds something for each slot; one that does not is scratch, and of no slot."""
        return "C" in self.shape.split(",")

    @property
    def of_slots(self) -> bool:
        """Whether it says something of each slot, 0 of a dead one; keys and values of dead slots mean nothing."""
        return self.dtype == "float32" and self.shape.endswith(",C")

    def row_sizes(self, rows: int) -> tuple[int, ...]:
        """The shape in numbers of what is no group's, for a run of so many rows."""
        return tuple(rows if size == "B" else int(size) for size in self.shape.split(","))

    def sizes(self, group: CacheGroup, *, batch: int, head_dim: int) -> tuple[int, ...]:
        """The shape in numbers, for one group."""
        known = {"B": batch, "Hkv": len(group.heads), "C": group.capacity, "D": head_dim}
        return tuple(known[size] if size in known else int(size) for size in self.shape.split(","))


KEY = Buffer(name="key", shape="B,Hkv,C,D", dtype="T")
VALUE = Buffer(name="value", shape="B,Hkv,C,D", dtype="T")
BIAS = Buffer(name="slot_bias", shape="B,Hkv,C", dtype="float32")

KEY_SCALE = Buffer(name="key_scale", shape="B,Hkv,C", dtype="float32")
VALUE_SCALE = Buffer(name="value_scale", shape="B,Hkv,C", dtype="float32")
"""Of int8 caches: what a slot's codes are multiplied by."""

POSITION, CHUNK = "slot_position", "slot_chunk"

TURN = Buffer(name="slot_turn", shape="B,1,C", dtype="int64")
"""The column of methods that work on turns: 2 x turns finished before a token, + 1 for a Nexus row; -1: pinned."""

TOKEN = Buffer(name="slot_token", shape="B,1,C", dtype="int64")
"""The column of methods that begin rows as tokens of a turn: the id that was appended."""


class CacheLayout(BaseModel):
    """Everything a host keeps of a conversation.

    Attributes:
        groups: cache groups, in the order of their numbers.
        buffers: memory of every group, on the device.
        slot_columns: int64 for every slot, kept by the host; they move with the slots through every program.
        step_inputs: decoder inputs beyond ids, positions, logits_index and length: int64 of one dimension, or of B rows
            of one or two, 0 in every run for which no behaviour says otherwise; a graph for prompts alone may lack one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: tuple[CacheGroup, ...] = Field(min_length=1)
    buffers: tuple[Buffer, ...]
    slot_columns: tuple[Buffer, ...] = ()
    step_inputs: tuple[Buffer, ...] = ()

    def by_heads(self) -> list[tuple[int, tuple[int, ...]]]:
        """Numbers of heads that groups have, rising, and the groups that have so many: a graph of a group for each."""
        found: dict[int, list[int]] = {}
        for number, group in enumerate(self.groups):
            found.setdefault(len(group.heads), []).append(number)
        return [(heads, tuple(numbers)) for heads, numbers in sorted(found.items())]


def with_scales(layout: CacheLayout) -> CacheLayout:
    """The layout of int8 caches: keys and values have scales."""
    return layout.model_copy(update={"buffers": (*layout.buffers, KEY_SCALE, VALUE_SCALE)})


class Binding(BaseModel):
    """Patterns of the names under which a program takes a buffer and gives it back.

    In a program of scope "cache" the output lies in the input's buffer (an alias pair). In one of scope "group" a
    buffer with both is read from the group's and written to a spare one, which then becomes the group's, but for an
    alias pair of the graph.

    Attributes:
        input: None: the program does not take the buffer.
        output: None: it does not give it back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str | None
    output: str | None

    def names(self, group: int, groups: int) -> tuple[str | None, str | None]:
        """Both names, for one group of so many."""
        tag = names.number_tag(group, groups)
        source, result = (pattern and pattern.replace(names.TAG, tag) for pattern in (self.input, self.output))
        return source, result


class Program(NamedTuple):
    """A portable graph (domain `semkv`, functions included) that works on a layout's buffers.

    Attributes:
        name: what a host calls it by, such as "compress".
        graph: sizes of batch and capacity symbolic, the number of heads static.
        scope: what one run takes.
        groups: numbers of the groups it is for: those with its number of heads.
        in_place: input -> output that may be one buffer: what it does not change is not copied.
    """

    name: str
    graph: onnx.ModelProto
    scope: Scope
    groups: tuple[int, ...]
    in_place: Mapping[str, str] = MappingProxyType({})

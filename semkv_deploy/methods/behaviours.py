"""What a host does between runs, as data: a small closed set, interpreted by `runtime.behaviours` and by other hosts.

A method declares behaviours (`Method.behaviours`), the contract carries them, and a session makes one interpreter for
each and calls them in order.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.model.blocks import BlockRule

NO_MERGE = 2.0
"""A similarity threshold that no cosine reaches."""

COMPRESS_RULE = (
    "one group at a time, from its buffers into spare ones of the same shape, which then become the group's, as "
    "length_out, slot_position_out and slot_chunk_out become its state; the buffers it came from may be overwritten by "
    "the run; level and evicted are for statistics; where the decoder has no slot_bias, give zeros and ignore what "
    "comes out"
)
FULL_RULE = (
    "before a run that appends n[row] tokens (0 to a row that the run does not move): a group has to make room if "
    "length + n > capacity - reserve in some row; there such rows get keep_slots as their target, other rows get the "
    "capacity and are copied; a group with room in every row is left alone"
)
TURN_RULE = (
    "with when = turn, every group is also compressed when a turn ends: rows whose turn it is get the target "
    "turn_share x position, rounded up, but at least `least` and at most keep_slots; other rows get the capacity"
)
RECENT_RULE = "recent[row] is recent_share x the row's target, rounded down, but at least recent_least"


class MakeRoom(BaseModel):
    """Compress groups in which the next append would not fit; and, if asked, at every turn's end.

    An input that the program's graph does not have is not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["make_room"] = Field(default="make_room", description="says which behaviour it is")
    program: str = Field(description="run for one group after the other; its input target is [batch]")
    when: Literal["full", "turn"] = Field(description="when full, or at every turn end as well")
    keep_slots: tuple[int, ...] = Field(description="by group, slots that may stay when a full group is compressed")
    turn_share: tuple[float, ...] = Field(description="by group, slots kept at a turn's end as a share of the position")
    least: int = Field(description="least target of a row at a turn's end", ge=1)
    recent_share: float = Field(description="of a row's target, how much is never merged", ge=0, le=1)
    recent_least: int = Field(default=0, description="slots that are never merged, however small the target", ge=0)
    reserve: int = Field(default=0, description="slots that other behaviours need free between runs", ge=0)
    by_group: dict[str, tuple[int | float | tuple[float, ...], ...]] = Field(
        description="program inputs whose values are fixed, by group: a number is a scalar, a list one dimension"
    )
    compress_rule: str = COMPRESS_RULE
    full_rule: str = FULL_RULE
    turn_rule: str = TURN_RULE
    recent_rule: str = RECENT_RULE

    @property
    def levels(self) -> int:
        """Length of the ladder of thresholds; 0 where the program has none."""
        ladder = self.by_group["thresholds"][0] if "thresholds" in self.by_group else ()
        return len(ladder) if isinstance(ladder, tuple) else 0


READ_RULE = (
    "unread[row] are the tokens appended since the row was last read again; before a run for which a group has to make "
    "room (full_rule), and with when = turn at a turn's end, each row that has to, or whose turn it is, is read again: "
    "its unread tokens in pieces of piece tokens, one row and one run at a time as a prompt is, each appended behind "
    "the row's live slots, in the place of the one before it, with positions from min(position, max_context - piece) "
    "on; the input is 1 in these runs and 0 in all others; neither length, position nor slot columns change, and "
    "logits mean nothing; then unread[row] is empty"
)


class ReadAgain(BaseModel):
    """Read what was appended again, so that the decoder writes down how much each slot is looked at.

    Stands before the behaviour that makes room.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["read_again"] = Field(default="read_again", description="says which behaviour it is")
    program: str = Field(description="the decoder")
    input: str = Field(description="of the program, int64 [1]: whether a run is recorded")
    when: Literal["full", "turn"] = Field(description="as the behaviour that makes room")
    piece: int = Field(description="most tokens that are read again in one run; reserve keeps room for them", ge=1)
    read_rule: str = READ_RULE


NUMBER_RULE = (
    "blocks of a row are numbered from 0 as they begin; after an append, of the tokens that were open before it and of "
    "those appended, each slot whose slot_position is that of such a token gets the number of the token's block, the "
    "open block's number being how many are closed; an appended slot has 0 until then, and numbers move with the slots"
)


class Blocks(BlockRule):
    """Cut what is appended into semantic blocks, and note in a slot column which block each slot is of."""

    kind: Literal["blocks"] = Field(default="blocks", description="says which behaviour it is")
    column: str = Field(description="slot column of block numbers")
    number_rule: str = NUMBER_RULE


TABLE_RULE = (
    "where nothing is evicted, slots are positions: a row's block ends at the slot behind its last token. Before every "
    "run the input has for each row the ends of its closed blocks in order, then position where the open block has a "
    "token, then 0. After an append that closed blocks, the program is run for every group, once for every row with "
    "such blocks: block_start, block_length and block_number [batch, closed] are the first slot, the tokens and the "
    "number of each, and 0, 0, most - 1 in all other places"
)


class BlockTables(BlockRule):
    """Cut what is appended into semantic blocks, tell the decoder where they end, and map those that are closed."""

    kind: Literal["block_tables"] = Field(default="block_tables", description="says which behaviour it is")
    program: str = Field(description="run for every group when blocks are closed")
    input: str = Field(description="of the decoder, int64 [batch, most]: where blocks end")
    most: int = Field(description="blocks of a row at most; the last is no block's", ge=3)
    closed: int = Field(description="blocks that one run closes at most", ge=1)
    table_rule: str = TABLE_RULE


Behaviour = Annotated[MakeRoom | ReadAgain | Blocks | BlockTables, Field(discriminator="kind")]
"""What manifests hold; they say which by `kind`."""

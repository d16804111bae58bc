"""What a host does between runs, as data: a small closed set, interpreted by `runtime.behaviours` and by other hosts.

A method declares behaviours (`Method.behaviours`), the contract carries them, and a session makes one interpreter for
each and calls them in order.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.model.blocks import BlockRule
from semkv_deploy.model.spread import SPREAD_RULE, Placement

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


FREEZE_RULE = (
    "frozen[group, row] are the row's first slots that are of finished turns, pinned[group, row] those of them that "
    "were pinned; begun[row] is the position at which its open turn began; all are 0 at first. A row's turn has ended "
    "once the host says so; where it has a token it is finished before the row's next run (with when = turn, at "
    "once): in each group its slots are fitted to own, which is turn_share x (position - begun) rounded up, in "
    "double, but at least `least` less frozen; then frozen is length, and begun is position"
)
OVERFLOW_RULE = (
    "before a run that appends n[row] tokens (0 to a row that the run does not move), each row of a group in which "
    "length + n > capacity - reserve is fitted to own = length - frozen; its turn goes on"
)
FIT_RULE = (
    "own is at most length - frozen, and at most the larger of keep_slots - frozen and half of keep_slots, rounded "
    "down. First, where frozen + own < length, the program gets the target frozen + own, and as sinks the larger of "
    "by_group's and frozen: nothing of older turns changes. Then, where length > keep_slots, older turns give way: "
    "the target is keep_slots, sinks the larger of by_group's and pinned, and recent = length - frozen, both as they "
    "are before that run; frozen falls by as much as length. A run has one number of sinks: rows of a group that need "
    "others are in runs of their own, those with the least first; rows that a run is not for get the capacity as "
    "their target and are copied"
)
OWN_RECENT_RULE = (
    "of a turn's own slots recent[row] are recent_share x own, rounded down; before an append, where the turn goes "
    "on, at least recent_least"
)


class IsolatedTurns(MakeRoom):
    """Compress a turn once, when it is over, and never again while there is room: each turn by itself.

    A host pins what a row has so far by making it frozen and pinned, where keep_slots less its half, rounded down, has
    room for it; its turn then begins at its position.
    """

    kind: Literal["isolated_turns"] = Field(  # type: ignore[assignment]
        default="isolated_turns", description="says which behaviour it is"
    )
    when: Literal["begin", "turn"] = Field(  # type: ignore[assignment]
        description="when an ended turn is finished: as the next one begins, at once"
    )
    keep_slots: tuple[int, ...] = Field(description="by group, slots that a compression leaves at most")
    turn_share: tuple[float, ...] = Field(description="by group, slots that a turn keeps as a share of its tokens")
    least: int = Field(description="slots that the first turn keeps at least", ge=1)
    recent_share: float = Field(description="of a turn's slots, how many are never merged", ge=0, le=1)
    recent_least: int = Field(
        default=0, description="slots of a turn that goes on that are never merged, however few it keeps", ge=0
    )
    full_rule: str = OVERFLOW_RULE
    turn_rule: str = FREEZE_RULE
    recent_rule: str = OWN_RECENT_RULE
    fit_rule: str = FIT_RULE


READ_RULE = (
    "unread[row] are the tokens appended since the row was last read again; before a run for which a group has to "
    "make room (full_rule), with when = turn at a turn's end, and before isolated_turns finish a turn, each row that "
    "has to, or whose turn it is, is read again: its unread tokens in pieces of piece tokens, one row and one run at "
    "a time as a prompt is, each appended behind the row's live slots, in the place of the one before it, with "
    "positions from min(position, max_context - piece) on; the input is [n, runs] in the n-th, from 1, of these runs "
    "and 0 in all others; neither length, position nor slot columns change, and logits mean nothing; then unread[row] "
    "is empty"
)


class ReadAgain(BaseModel):
    """Read what was appended again, so that the decoder writes down how much each slot is looked at.

    Stands before the behaviour that makes room.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["read_again"] = Field(default="read_again", description="says which behaviour it is")
    program: str = Field(description="the decoder")
    input: str = Field(description="of the program, int64 [2]: which run is recorded, of how many")
    when: Literal["full", "turn"] = Field(description="as the behaviour that makes room")
    piece: int = Field(description="most tokens that are read again in one run; reserve keeps room for them", ge=1)
    read_rule: str = READ_RULE


SLOT_TURN_RULE = (
    "slot_turn is, for a token, 2 x the turns that its row had finished when it was appended, and one more for a Nexus "
    "row; -1 for a token that the user pinned; sinks are the slots whose slot_position is below sinks"
)
FINISH_RULE = (
    "a row's turn has ended once the host says so; it is finished before the row's next run (with when = turn, at "
    "once): its tokens are those with positions from begun on, sinks left out, L of them; slots = tokens, or where "
    "that is 0 kept x L rounded up, in double; K = nexus_share x slots rounded up, at most `most`; R = slots "
    "less nexus_share x slots rounded up; where slots < L: room is made for K, and the decoder appends K rows as a "
    "prompt of the row, in pieces of at most prefill_chunk, with ids first_id + min(turn, turns - 1) x most + 0 … K-1 "
    "(no delimiters) and the positions that follow, which the position counts, but for what spread_rule says; once all "
    "rows whose turn is over have "
    "theirs, the program drops the turns' tokens but each one's last R; else they all stay; then such a row has one "
    "more finished turn, and begun is its position; turn and begun are 0 at first"
)
NEXUS_ROOM_RULE = (
    "before a run that appends n[row] rows: in each group where length + n > capacity in some row, such rows lose all "
    "slots (no sinks) of finished turns, the oldest first, as many whole turns as it takes; where that does not do, "
    "the oldest slots of the open turn go as well (no sinks, none that is pinned) until at most keep_slots and "
    "capacity - n are left"
)
DROP_RULE = (
    "the program is run for one group at a time as one that makes room is, without a target: keep_index [batch, 1, "
    "capacity] names the slots that stay, in order, then -1; rows in which nothing is dropped name all of their live "
    "slots"
)


class NexusTurns(BaseModel):
    """Let a few Nexus rows stand for a finished turn (SONIC): append them, and drop the turn's tokens.

    Until a turn is finished its tokens are the row's last: a host that puts position, length and the chunk count back
    to what they were when it began has undone it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nexus_turns"] = Field(default="nexus_turns", description="says which behaviour it is")
    program: str = Field(description="drops slots; its input keep_index is [batch, 1, capacity]")
    decoder: str = Field(description="appends Nexus rows: the program that runs prompts")
    when: Literal["begin", "turn"] = Field(
        description="when an ended turn is finished: as the next one begins, at once"
    )
    first_id: int = Field(description="id of the first Nexus row of turn 0: ids of the vocabulary are below", ge=1)
    placement: Placement = Field(
        default="appended", description="appended: Nexus rows have positions of their own; spread: those of tokens"
    )
    common: tuple[int, ...] = Field(
        default=(), description="ids of common tokens, which spread rows begin as last, from the most common one on"
    )
    most: int = Field(description="most Nexus rows of a turn", ge=1)
    turns: int = Field(description="turns whose Nexus rows differ; later ones have those of the last", ge=1)
    kept: float = Field(description="slots that a turn keeps, as a share of its tokens", gt=0, le=1)
    tokens: int = Field(default=0, description="slots that a turn keeps, whatever its length; 0: by kept", ge=0)
    nexus_share: float = Field(description="of a turn's slots, how many are Nexus rows; the rest are its last tokens")
    sinks: int = Field(description="first tokens of a conversation, which always stay", ge=0)
    keep_slots: tuple[int, ...] = Field(description="by group, slots that may stay when an open turn is cut")
    slot_turn_rule: str = SLOT_TURN_RULE
    finish_rule: str = FINISH_RULE
    spread_rule: str = SPREAD_RULE
    nexus_room_rule: str = NEXUS_ROOM_RULE
    drop_rule: str = DROP_RULE


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
    "number of each, and 0, 0, most - 1 in all other places. A run of one token attends to the slots that the graph "
    "chooses, in a graph without the input to all: prompts have one of their own where graphs are by phase"
)


class BlockTables(BlockRule):
    """Cut what is appended into semantic blocks, tell the decoder where they end, and map those that are closed."""

    kind: Literal["block_tables"] = Field(default="block_tables", description="says which behaviour it is")
    program: str = Field(description="run for every group when blocks are closed")
    input: str = Field(description="of the decoder, int64 [batch, most]: where blocks end")
    most: int = Field(description="blocks of a row at most; the last is no block's", ge=3, le=1 << 20)
    closed: int = Field(description="blocks that one run closes at most", ge=1, le=1 << 20)
    table_rule: str = TABLE_RULE


SLOT_TABLE_RULE = (
    "in each KV head of each group a row's live slots are cut into runs of one number in the column; the last run is a "
    "block of the head, and of the others, from the first on, each joins the block before it where both together have "
    "at most `join` slots. Before every run, those that read again as well, the input has for each row and head, heads "
    "of all groups in order, the slots behind each block, then 0; and but for each head's last block representatives "
    "are what the program writes of the block's slots: hosts run it for blocks whose slots are others than when they "
    "were mapped, for a group as often as it takes: block_start, block_length and block_number [batch, heads, closed] "
    "are the first slot, the slots and the number in the head of each, and 0, 0, most - 1 in all other places"
)


class SlotTables(BaseModel):
    """Tell the decoder where blocks end in each KV head's slots, of which some were evicted, and map those blocks.

    Stands behind the behaviours that number blocks and make room.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["slot_tables"] = Field(default="slot_tables", description="says which behaviour it is")
    program: str = Field(description="run for a group in which there are blocks to map")
    input: str = Field(description="of the decoder, int64 [batch, heads of all groups, most]: where blocks end")
    column: str = Field(description="slot column of block numbers")
    join: int = Field(description="slots up to which what is left of neighbours is one block", ge=1, le=4096)
    most: int = Field(description="blocks of a head at most; the last is no block's", ge=3, le=1 << 20)
    closed: int = Field(description="blocks of a head that one run maps at most", ge=1, le=1 << 20)
    slot_table_rule: str = SLOT_TABLE_RULE


Behaviour = Annotated[
    MakeRoom | IsolatedTurns | ReadAgain | NexusTurns | Blocks | BlockTables | SlotTables, Field(discriminator="kind")
]
"""What manifests hold; they say which by `kind`."""

"""Which tokens of a turn its Nexus rows begin as, where they are spread over it (SONIC)."""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Literal

Placement = Literal["appended", "spread"]
"""Where a turn's Nexus rows stand: at positions of their own behind it, or at those of tokens of the turn, which they
begin as."""

SPREAD_RULE = (
    "with placement = spread, Nexus row j (from 0) of a turn begins as a token of the turn: of the n slots that the "
    "drop takes from the row in group 0, in order, the one whose number is the j-th of this list: n-1, n-2, … 0 and, "
    "taken in turn with these, n-1 less each of 0, 1, 2, … 2^b - 1 with its b bits reversed, those below 0 left out, "
    "b being the bits of n-1, at least 1; a number that is there already is passed over. K is at most n; row j has the "
    "id first_id + (min(turn, turns - 1) x most + j) x first_id + slot_token of that slot, and its slot_position, and "
    "position does not count it; slot_token is the id that was appended"
)


def spread_order(length: int) -> list[int]:
    """Numbers of a turn's `length` tokens in the order in which its Nexus rows begin as them: `SPREAD_RULE`.

    Half of the first K, for any K, are the turn's last tokens, which the next ones look at most; the others are about
    evenly spread over it. A row's token does not depend on how many follow, so that one adapter serves every budget.
    """
    bits = max(1, (length - 1).bit_length())
    evenly = (length - 1 - int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    pairs = zip_longest(range(length - 1, -1, -1), (token for token in evenly if token >= 0))
    # Lists of the same numbers have one length.
    return list(dict.fromkeys(chain.from_iterable(pairs)))

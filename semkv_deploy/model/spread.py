"""Which tokens of a turn its Nexus rows begin as, where they are spread over it (SONIC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Literal

Placement = Literal["appended", "spread"]
"""Where a turn's Nexus rows stand: at positions of their own behind it, or at those of tokens of the turn, which they
begin as."""

SPREAD_RULE = (
    "with placement = spread, Nexus row j (from 0) of a turn begins as a token of the turn: of the n slots that the "
    "drop takes from the row in group 0, in order, the one whose number is the j-th of this list: n-1, n-2, … 0 and, "
    "taken in turn with these, n-1 less each of 0, 1, 2, … 2^b - 1 with its b bits reversed, those below 0 left out, "
    "b being the bits of n-1, at least 1, these sorted by what their slots' slot_token is, others than those in common "
    "first, then those in common from its last to its first, and equal ones as they were; a number that is there "
    "already is passed over. K is at most n; row j has the id first_id + (min(turn, turns - 1) x most + j) x first_id "
    "+ slot_token of that slot, and its slot_position, and "
    "position does not count it; slot_token is the id that was appended"
)


def rank_of(common: Sequence[int]) -> Mapping[int, int]:
    """Where each of the tokens stands in `common`, which has them from the most common one on."""
    return MappingProxyType({token: place for place, token in enumerate(common)})


def spread_order(tokens: Sequence[int], rank: Mapping[int, int] = MappingProxyType({})) -> list[int]:
    """Places of a turn's `tokens` in the order in which its Nexus rows begin as them: `SPREAD_RULE`.

    Half of the first K, for any K, are the turn's last tokens, which the next ones look at most; the others are its
    rarest, about evenly spread over it where they are as rare. Names and numbers are rare: later turns ask for them,
    and no other row can say them. A row's token does not depend on how many follow, so that one adapter serves every
    budget.

    Args:
        rank: of common tokens, as `rank_of` gives it; none: all are as rare.
    """
    length = len(tokens)
    bits = max(1, (length - 1).bit_length())
    reversed_bits = (length - 1 - int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    evenly = [place for place in reversed_bits if place >= 0]
    rarest = sorted(evenly, key=lambda place: -rank.get(tokens[place], len(rank)))
    pairs = zip_longest(range(length - 1, -1, -1), rarest)
    # Lists of the same numbers have one length.
    return list(dict.fromkeys(chain.from_iterable(pairs)))

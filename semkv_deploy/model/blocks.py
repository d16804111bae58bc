"""Semantic blocks: a growing text is cut where a delimiter weighs most, at bounded lengths (DynSplit-KV).

The paper (arXiv 2602.03184) looks for the boundary of a block that begins at s within s + C - search .. s + C + search
and takes the delimiter of the largest weight. Ours: weights are numbers of a table, by token id and domain; a penalty
on the distance from C; the tie rule; the cut at C where the window has no delimiter; turn markers; and that a block is
cut when the last token of its window is there, or a turn marker in it, so that boundaries depend neither on what comes
later nor on how a prompt was cut into pieces. Everything is integers: every host finds the same boundaries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

UNIT = 1000
"""Weights and logarithms are integers, this many to one."""

NO_DELIMITER, TURN = -1, -2
"""Codes of a token that ends nothing, and of one that ends a turn; others index a domain's weights."""

BLOCK_RULE = (
    "a row's tokens are cut into blocks, one token after the other: a token of turn_ids has the code turn; one of "
    "token_ids its index there; another delimiter (token_ids of the file delimiters) their number; others have none. "
    "For each domain, log_shares[code] is added to a sum for every token with a code but turn. The open block is cut "
    "when it has base - search tokens or more and the last of them is turn: behind that token; else when it has "
    "base + search tokens: behind the n-th, base - search <= n <= base + search, that has a code and the largest "
    "weights[code] x max(search, 1) - nearness x |n - base|, of equal ones with the smallest |n - base|, of these with "
    "the smallest n; behind the token base where none has a code. Weights are those of the domain with the largest sum "
    "so far, of equal ones the first, or of `domain`. Tokens behind the cut are the next open block's"
)


class DomainWeights(BaseModel):
    """What delimiters weigh in texts of one kind.

    Attributes:
        name: such as prose, code, chat, cjk.
        weights: of each of the table's token ids in thousandths, then of any other delimiter.
        log_shares: the logarithm of its share of the domain's delimiters, likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weights: tuple[int, ...]
    log_shares: tuple[int, ...]


class BlockRule(BaseModel):
    """Where a text is cut into blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: int = Field(description="tokens of a block where no delimiter says otherwise", ge=1, le=4096)
    search: int = Field(description="how far from base a boundary is looked for, at most a quarter of base", ge=0)
    nearness: int = Field(default=0, description="what a weight loses for each token of distance from base", ge=0)
    turn_ids: tuple[int, ...] = Field(default=(), description="token ids that end a turn")
    token_ids: tuple[int, ...] = Field(default=(), description="token ids with weights of their own")
    domains: tuple[DomainWeights, ...] = Field(
        default=(), description="weights and log_shares by kind of text; none: no token is a delimiter"
    )
    domain: int | None = Field(default=None, description="the domain that counts; null: the likeliest", ge=0)
    block_rule: str = BLOCK_RULE

    @property
    def longest(self) -> int:
        """Most tokens of a block."""
        return self.base + self.search

    @property
    def shortest(self) -> int:
        """Fewest tokens of a block that is closed."""
        return self.base - self.search

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 4 * self.search > self.base:
            raise ValueError("search is at most a quarter of base: what is behind a cut is no whole block then")
        counts = {len(numbers) for each in self.domains for numbers in (each.weights, each.log_shares)}
        if counts - {len(self.token_ids) + 1}:
            raise ValueError("every domain has a weight and a log share for each token id, and one for all others")
        if self.domain is not None and self.domain >= max(len(self.domains), 1):
            raise ValueError("domain is the number of a domain")
        return self

    def codes(self, is_delimiter: NDArray[np.bool_]) -> NDArray[np.int64]:
        """`[vocab]`: what each token is at a boundary; `is_delimiter` `[vocab]`."""
        import numpy as np

        codes = np.full(len(is_delimiter), NO_DELIMITER, np.int64)
        if self.domains:
            codes[is_delimiter] = len(self.token_ids)
            listed = [
                *zip(self.token_ids, range(len(self.token_ids)), strict=True),
                *((i, TURN) for i in self.turn_ids),
            ]
            for token, code in listed:
                if 0 <= token < len(codes):
                    codes[token] = code
        return codes

    def likeliest(self, sums: Sequence[int]) -> int:
        """The number of the domain that counts, given each domain's sum of log shares."""
        return self.domain if self.domain is not None else max(range(len(sums)), key=lambda n: (sums[n], -n))

    def best_length(self, codes: Sequence[int], domain: int) -> int:
        """Where an open block of `longest` tokens is cut: how many of them it keeps."""
        weights = self.domains[domain].weights if self.domains else ()
        best = None
        for n in range(self.shortest, self.longest + 1):
            if codes[n - 1] != NO_DELIMITER:
                distance = abs(n - self.base)
                score = weights[codes[n - 1]] * max(self.search, 1) - self.nearness * distance
                found = (score, -distance, -n)
                best = found if best is None else max(best, found)
        return self.base if best is None else -best[2]


def segment(rule: BlockRule, ids: Sequence[int], is_delimiter: NDArray[np.bool_]) -> list[int]:
    """The slow statement: lengths of the blocks that are closed once `ids` are there, from the whole text at once."""
    codes = rule.codes(is_delimiter)[list(ids)].tolist()
    lengths, start = [], 0
    while True:
        window = codes[start : start + rule.longest]
        ends = [n for n in range(rule.shortest, len(window) + 1) if window[n - 1] == TURN]
        if ends:
            lengths.append(ends[0])
        elif len(window) == rule.longest:
            seen = [code for code in codes[: start + rule.longest] if code >= 0]
            sums = [sum(domain.log_shares[code] for code in seen) for domain in rule.domains]
            lengths.append(rule.best_length(window, rule.likeliest(sums) if sums else 0))
        else:
            return lengths
        start += lengths[-1]


class SegmenterState(NamedTuple):
    """A segmenter at one time."""

    open: tuple[int, ...]
    sums: tuple[int, ...]
    closed: int


class Segmenter:
    """Cuts one row's growing text; see `BLOCK_RULE`.

    Args:
        rule: where it cuts.
        codes: `BlockRule.codes`, shared by all rows.

    Attributes:
        open: codes of the open block's tokens.
        sums: by domain, log shares of the delimiters seen so far.
        closed: blocks that are closed.
    """

    def __init__(self, rule: BlockRule, codes: NDArray[np.int64]) -> None:
        self.rule, self._codes = rule, codes
        self.open: list[int] = []
        self.sums = [0] * len(rule.domains)
        self.closed = 0

    @property
    def state(self) -> SegmenterState:
        """What `restore` takes."""
        return SegmenterState(tuple(self.open), tuple(self.sums), self.closed)

    def restore(self, state: SegmenterState) -> None:
        """Goes back to a state."""
        self.open, self.sums, self.closed = list(state.open), list(state.sums), state.closed

    def append(self, ids: NDArray[np.int64]) -> list[int]:
        """Takes the next tokens; returns the lengths of the blocks that they close, in order."""
        lengths = []
        for code in self._codes[ids].tolist():
            self.open.append(code)
            if code >= 0:
                self.sums = [
                    total + domain.log_shares[code] for total, domain in zip(self.sums, self.rule.domains, strict=True)
                ]
            length = self._cut(code)
            if length:
                del self.open[:length]
                self.closed += 1
                lengths.append(length)
        return lengths

    def _cut(self, last: int) -> int:
        """How many tokens of the open block are a block now; 0: it stays open."""
        rule = self.rule
        if last == TURN and len(self.open) >= rule.shortest:
            return len(self.open)
        if len(self.open) < rule.longest:
            return 0
        return rule.best_length(self.open, rule.likeliest(self.sums) if self.sums else 0)

"""Budgets as users write them, `0.2`, `1638tokens` or `64MiB`, and the share of a model's cache that each becomes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from semkv_deploy.errors import SemkvError
from semkv_deploy.sizes import exact_size, parse_size

SLOT_MULTIPLE = 64
"""Capacities are multiples of this many slots: the band of `SemanticCluster` and every fused kernel divide it."""

MIN_CAPACITY = 128

MAX_TOKENS = 1 << 27
"""More than any model's context: a larger number in a file is a damaged or hostile one."""
"""Slots that hold sinks, a window and the next append at least."""


@dataclass(frozen=True)
class Budget:
    """What a user allows the cache: a share of the entries, slots of a layer, or bytes of a batch row over all layers.

    Attributes:
        value: above 0; a share is at most 1, tokens and bytes are whole.
    """

    value: float
    unit: Literal["share", "tokens", "bytes"] = "share"

    def __str__(self) -> str:
        """The budget as a user writes it, which `parse_budget` reads as the same."""
        return f"{self.value!r}" if self.unit == "share" else _write(int(self.value), self.unit)

    def slots(self, max_context: int, bytes_per_slot: int) -> int:
        """Slots of a layer, a multiple of 64: a share is rounded up, tokens and bytes are rounded down.

        At most those of the full cache; 0 where the budget does not reach 64.
        """
        whole = math.ceil(max_context / SLOT_MULTIPLE)
        if self.unit == "share":
            blocks = math.ceil(self.value * max_context / SLOT_MULTIPLE)
        else:
            blocks = int(self.value) // (SLOT_MULTIPLE * (1 if self.unit == "tokens" else bytes_per_slot))
        return min(blocks, whole) * SLOT_MULTIPLE

    def resolve(self, max_context: int, bytes_per_slot: int) -> float:
        """Returns the share that is built: its capacity is `slots`, so never more than tokens or bytes allow.

        Raises:
            SemkvError: when tokens or bytes are too few to hold anything, with the least in the same unit.
        """
        if self.unit == "share":
            return self.value
        slots = self.slots(max_context, bytes_per_slot)
        if slots >= max_context:
            return 1.0
        if slots < MIN_CAPACITY:
            least = _write(MIN_CAPACITY * (1 if self.unit == "tokens" else bytes_per_slot), self.unit)
            raise SemkvError(
                f"{self} of cache is a capacity of {slots} slots, too few to hold anything",
                where="--budget",
                expected=f"at least {least}",
                fix=f"raise --budget to {least} or more",
            )
        # Four digits, more where contexts are so long that they are not enough: a share that can be typed again.
        for digits in range(4, 17):
            share = math.floor(slots / max_context * 10**digits) / 10**digits
            if share > 0 and Budget(share).slots(max_context, bytes_per_slot) == slots:
                break
        return share


BudgetLike = Budget | str | float
"""A budget, or what `parse_budget` reads; a number is a share."""


def _write(count: int, unit: Literal["tokens", "bytes"]) -> str:
    return f"{count}tokens" if unit == "tokens" else exact_size(count)


def parse_budget(text: BudgetLike) -> Budget:
    """Reads a budget: `0.2` (share kept), `1638tokens` (slots of a layer) or `64MiB` (bytes of a row, all layers).

    Raises:
        SemkvError: when it is none of them, or a share not in (0, 1].
    """
    if isinstance(text, Budget):
        return text
    expected = "a share kept, 0 < budget <= 1, slots such as 1638tokens, or bytes of a row's cache such as 64MiB"
    fix = "use for example --budget 0.2 to keep a fifth of the cache"
    try:
        value = float(text)
    except ValueError:
        return _parse_amount(str(text), expected, fix)
    if not 0 < value <= 1:
        raise SemkvError("out of range", where="--budget", expected=expected, got=f"{value:g}", fix=fix)
    return Budget(value)


def _parse_amount(text: str, expected: str, fix: str) -> Budget:
    tokens = re.fullmatch(r"(\d+)\s*tokens?", text.strip(), re.ASCII)
    if tokens:
        amount = Budget(int(tokens[1]), "tokens")
    else:
        try:
            amount = Budget(parse_size(text), "bytes")
        except SemkvError:
            raise SemkvError("not a budget", where="--budget", expected=expected, got=repr(text), fix=fix) from None
    if not amount.value:
        raise SemkvError("out of range", where="--budget", expected=expected, got=text, fix=fix)
    return amount


def resolve_budgets(budgets: Iterable[BudgetLike], max_context: int, bytes_per_slot: int) -> list[float]:
    """Returns the shares that are built for `budgets`, each once, the smallest first."""
    return sorted({parse_budget(budget).resolve(max_context, bytes_per_slot) for budget in budgets})


def choose_share(built: Sequence[float], budget: BudgetLike, max_context: int, bytes_per_slot: int) -> float:
    """Returns the built share that `budget` asks for: a share itself, or the one whose slots tokens or bytes give.

    Raises:
        SemkvError: when there is none, with those that were built.
    """
    wanted = parse_budget(budget)
    for share in built:
        if wanted == Budget(share):
            return share
    slots = {share: Budget(share).slots(max_context, bytes_per_slot) for share in built}
    if wanted.unit != "share":
        for share in built:
            if slots[share] == wanted.slots(max_context, bytes_per_slot):
                return share
    raise SemkvError(
        "the bundle has no such budget",
        where="--budget",
        expected=" or ".join(
            f"{share:g} ({slots[share]}tokens, {exact_size(slots[share] * bytes_per_slot)})" for share in sorted(built)
        ),
        got=wanted,
        fix=f"build it with: semkv-deploy build … --budget {wanted}",
    )

"""Cache groups: which KV heads share buffers, a capacity and a length.

One group a layer unless a build asks for more. Which layers and heads need room is a fact of the model, so capacities
may differ: a build gives each group a share, and the budget stays the total of all groups.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semkv_deploy.errors import SemkvError

CAPACITY = "capacity"
"""Symbol of the slots in a portable graph's shapes, where all groups have one capacity."""

_FIX = "list every KV head of every layer in one group"


class GroupShare(BaseModel):
    """A group before its capacity is known.

    Attributes:
        layer: number of the decoder layer.
        heads: its KV heads in this group.
        share: of the cache, for each head, relative to the other groups: a head of share 2 gets twice the slots of a
            head of share 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    heads: tuple[int, ...] = Field(min_length=1)
    share: float = Field(default=1.0, gt=1e-9, lt=1e10, allow_inf_nan=False)


class CacheGroup(BaseModel):
    """KV heads of one layer that share buffers, a capacity and a length.

    Attributes:
        layer: number of the decoder layer.
        heads: its KV heads in this group, in rising order, as the buffers' head axis has them.
        capacity: slots for each batch row; a hard cap.
        keep_slots: slots that may stay when a full group is compressed; `capacity - keep_slots` is room for what comes.
        symbol: name of this capacity in the shapes of portable graphs; groups of one share have one name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0, lt=1 << 16)
    heads: tuple[int, ...] = Field(min_length=1)
    capacity: int = Field(gt=0, lt=1 << 31)
    keep_slots: int = Field(gt=0, lt=1 << 31)
    symbol: str = CAPACITY


def one_a_layer(layers: int, kv_heads: int) -> tuple[GroupShare, ...]:
    """One group for each layer, all of one share: the default."""
    return tuple(GroupShare(layer=layer, heads=tuple(range(kv_heads))) for layer in range(layers))


def one_a_head(layers: int, kv_heads: int) -> tuple[GroupShare, ...]:
    """One group for each KV head, all of one share."""
    return tuple(GroupShare(layer=layer, heads=(head,)) for layer in range(layers) for head in range(kv_heads))


def by_layer(shares: Sequence[float], kv_heads: int) -> tuple[GroupShare, ...]:
    """One group for each layer, of the layer's share."""
    heads = tuple(range(kv_heads))
    return tuple(GroupShare(layer=layer, heads=heads, share=share) for layer, share in enumerate(shares))


def parse_groups(text: str | None, layers: int, kv_heads: int) -> tuple[GroupShare, ...]:
    """The groups that a user asked for.

    Args:
        text: "layer", "head", or a JSON file: a list of `{"layer": 0, "heads": [0, 1], "share": 1.0}`; None: "layer".
        layers, kv_heads: of the model.

    Raises:
        SemkvError: when the file is missing or malformed, or its groups are not the model's heads, each once.
    """
    where = f"--cache-groups {text}"
    if text in (None, "layer"):
        return one_a_layer(layers, kv_heads)
    if text == "head":
        return one_a_head(layers, kv_heads)
    path = Path(str(text))
    if not path.is_file():
        raise SemkvError("no such grouping", where=where, expected="layer, head, or a JSON file of groups")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, list):
            raise SemkvError("not a list of groups", where=where, expected='[{"layer": 0, "heads": [0], "share": 1.0}]')
        groups = tuple(GroupShare.model_validate(group) for group in raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise SemkvError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from None
    except (ValueError, RecursionError) as error:
        raise SemkvError("not a JSON file of groups", where=where, got=str(error)[:100]) from None
    return check_groups(groups, layers, kv_heads, where)


def check_groups(
    groups: Sequence[GroupShare], layers: int, kv_heads: int, where: str = "cache groups"
) -> tuple[GroupShare, ...]:
    """The groups in order, by layer and first head.

    Raises:
        SemkvError: when they are not the model's KV heads, each once.
    """
    inside = [group.model_copy(update={"heads": tuple(sorted(group.heads))}) for group in groups]
    ordered = tuple(sorted(inside, key=lambda group: (group.layer, group.heads)))
    given = sorted((group.layer, head) for group in ordered for head in group.heads)
    wanted = [(layer, head) for layer in range(layers) for head in range(kv_heads)]
    if given != wanted:
        doubled = sorted({pair for pair in given if given.count(pair) > 1})
        stray, absent = sorted(set(given) - set(wanted)), sorted(set(wanted) - set(given))
        what, pairs = next(
            (what, pairs)
            for what, pairs in (("is in two groups", doubled), ("does not exist", stray), ("is in no group", absent))
            if pairs
        )
        raise SemkvError(
            f"head {pairs[0][1]} of layer {pairs[0][0]} {what}",
            where=where,
            expected=f"{layers} layers of {kv_heads} KV heads",
            fix=_FIX,
        )
    return ordered


def symbols(*by_budget: Sequence[GroupShare]) -> list[str]:
    """The capacity's name in each group's shapes: one for all, or one for each share.

    Args:
        by_budget: the same groups with the shares of each budget: groups of one name are alike in all.
    """
    shares = [tuple(group.share for group in budgets) for budgets in zip(*by_budget, strict=True)]
    kinds = list(dict.fromkeys(shares))
    if len(kinds) == 1:
        return [CAPACITY] * len(shares)
    return [f"{CAPACITY}_{kinds.index(share)}" for share in shares]


def is_default(groups: Sequence[CacheGroup], layers: int) -> bool:
    """Whether these are one group a layer, of one capacity's name: the form that exports have."""
    return len(groups) == layers and {group.symbol for group in groups} == {CAPACITY}

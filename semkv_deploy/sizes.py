"""Sizes in bytes, as users write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from semkv_deploy.errors import SemkvError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}


def parse_size(text: str, *, where: str = "memory") -> int:
    """Reads bytes: `8GiB`, `512 MB`, `1.5gib`, or plain bytes.

    Args:
        where: the option, for the error.

    Raises:
        SemkvError: when it is not a size above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    bytes_ = int(Decimal(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if bytes_ <= 0:
        raise SemkvError(
            "not a size",
            where=where,
            expected="a number above 0 and a unit: B, kB, MB, GB, TB (of 1000) or KiB, MiB, GiB, TiB (of 1024)",
            got=repr(text),
            fix="write for example 8GiB",
        )
    return bytes_


def size(count: float) -> str:
    """Rounds bytes for people: `512.0 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def exact_size(count: int) -> str:
    """Writes bytes so that `parse_size` reads the same number: `64MiB`, `1.5KiB`, `1001B`."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power and count * 10_000 % 1024**power == 0:
            whole, decimals = divmod(count * 10_000 // 1024**power, 10_000)
            return f"{whole}.{decimals:04d}".rstrip("0").rstrip(".") + unit
    return f"{count}B"


def row_bytes(dtype: str, head_dim: int) -> int:
    """Bytes of a key or a value of one head in a cache of this type; int8 rows have a float32 scale each."""
    if dtype == "int8":
        return head_dim + 4
    return head_dim * {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]

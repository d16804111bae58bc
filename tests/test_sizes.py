from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semkv_deploy.errors import SemkvError
from semkv_deploy.sizes import exact_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 << 30), ("512 MB", 512_000_000), ("1.5gib", 3 << 29), ("4096", 4096), ("2kB", 2000), ("7 KiB", 7168)],
)
def test_sizes(text: str, expected: int):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-1GiB", "0", "1e9", "8 G B"])
def test_what_is_no_size(text: str):
    with pytest.raises(SemkvError, match=r"not a size .*\. Write for example 8GiB"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_exact_size_is_read_as_the_same_number(count: int):
    assert parse_size(exact_size(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1B"),
        (1023, "1023B"),
        (1536, "1.5KiB"),
        (64 << 20, "64MiB"),
        (1664 * 46080, "73.125MiB"),
        (100 << 30, "100GiB"),
    ],
)
def test_exact_size_takes_the_largest_unit_that_needs_four_decimals_at_most(count: int, text: str):
    assert exact_size(count) == text

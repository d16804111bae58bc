from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semkv_deploy.budget_units import MIN_CAPACITY, Budget, choose_share, parse_budget, resolve_budgets
from semkv_deploy.errors import SemkvError


@pytest.mark.parametrize("text", ["0", "1.5", "-0.1", "nan", "inf"])
def test_budget_out_of_range(text: str):
    with pytest.raises(SemkvError, match=r"--budget: out of range \(expected .*0 < budget <= 1, .*64MiB, got"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["abc", "", "1.5tokens", "-1tokens", "12 parsecs", "20%", "64MiBs", "1_000tokens"])
def test_what_is_no_budget(text: str):
    with pytest.raises(SemkvError, match=rf"--budget: not a budget .*1638tokens, .*64MiB, got {text!r}\)"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.2", Budget(0.2)),
        (0.2, Budget(0.2)),
        ("1638tokens", Budget(1638, "tokens")),
        (" 1638 tokens ", Budget(1638, "tokens")),
        ("64MiB", Budget(64 << 20, "bytes")),
        ("64 mb", Budget(64_000_000, "bytes")),
        ("1.5GiB", Budget(3 << 29, "bytes")),
    ],
)
def test_what_users_write(text: str | float, budget: Budget):
    assert parse_budget(text) == budget


BUDGETS = st.one_of(
    st.floats(0, 1, exclude_min=True).map(Budget),
    st.integers(1, 1 << 20).map(lambda count: Budget(count, "tokens")),
    st.integers(1, 1 << 44).map(lambda count: Budget(count, "bytes")),
)


@given(BUDGETS)
def test_a_printed_budget_is_read_as_the_same(budget: Budget):
    assert parse_budget(str(budget)) == budget


@given(BUDGETS.filter(lambda budget: budget.unit != "share"), st.integers(65, 2_000_000), st.integers(1, 1 << 20))
def test_tokens_and_bytes_are_never_exceeded(budget: Budget, context: int, slot: int):
    """And as many slots as they allow are used, rounded down to 64, up to the full cache."""
    allowed = int(budget.value) if budget.unit == "tokens" else int(budget.value) // slot
    assert budget.slots(context, slot) == min(allowed // 64 * 64, -(-context // 64) * 64) <= allowed
    if allowed < MIN_CAPACITY:
        with pytest.raises(SemkvError, match="too few to hold anything"):
            budget.resolve(context, slot)
        return
    share = budget.resolve(context, slot)
    # The share stands for it from then on: in the manifest, and typed as a table prints it.
    assert 0 < share <= 1 and Budget(share).slots(context, slot) == budget.slots(context, slot)
    if context < 500_000:
        assert float(f"{share:g}") == share


@given(st.floats(0.001, 1), st.integers(1, 200_000))
def test_a_share_is_rounded_up_and_stays_what_it_is(share: float, context: int):
    slots = Budget(share).slots(context, 1)
    assert slots % 64 == 0 and share * context <= slots + 1e-6 and slots < share * context + 64
    assert Budget(share).resolve(context, 1) == share


@given(st.integers(129, 100_000), st.integers(1, 1 << 20), st.sampled_from(["tokens", "bytes"]))
def test_the_least_an_error_names_is_enough(context: int, slot: int, unit: Literal["tokens", "bytes"]):
    with pytest.raises(SemkvError) as error:
        Budget(1, unit).resolve(context, slot)
    (least,) = re.findall(r"expected at least ([\w.]+)", str(error.value))
    assert parse_budget(least).unit == unit
    assert parse_budget(least).slots(context, slot) == MIN_CAPACITY


def test_a_built_budget_is_found_in_any_unit():
    built, context, slot = [0.2, 0.5], 8192, 46080
    assert choose_share(built, "0.5", context, slot) == 0.5
    assert choose_share(built, "1664tokens", context, slot) == 0.2
    assert choose_share(built, "1700tokens", context, slot) == 0.2
    assert choose_share(built, Budget(1664 * slot, "bytes"), context, slot) == 0.2
    assert choose_share(built, "74MiB", context, slot) == 0.2
    for absent in ("0.20001", "1663tokens", "73MiB", "1tokens"):
        with pytest.raises(SemkvError) as error:
            choose_share(built, absent, context, slot)
        assert str(error.value) == (
            "--budget: the bundle has no such budget (expected 0.2 (1664tokens, 73.125MiB) or "
            f"0.5 (4096tokens, 180MiB), got {absent}). Build it with: semkv-deploy build … --budget {absent}."
        )


def test_budgets_that_are_one_share_are_built_once():
    assert resolve_budgets(["0.5", 0.25, "128tokens", "64KiB"], 512, 512) == [0.25, 0.5]

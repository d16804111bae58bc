from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semkv_deploy.budget import static_profile
from semkv_deploy.budget_units import MIN_CAPACITY
from semkv_deploy.errors import SemkvError


def test_profile_of_a_fifth_of_8192():
    profile = static_profile(0.2, 8192, bytes_per_slot=46080)
    assert profile.capacity == 1664
    assert profile.cache_bytes == 1664 * 46080
    assert profile.label == "0.2 (80 % compression)"


@given(st.floats(0.01, 1), st.integers(128, 200_000))
def test_capacity_is_a_cap_rounded_up(budget: float, context: int):
    try:
        profile = static_profile(budget, context, bytes_per_slot=1)
    except SemkvError as error:
        assert "too few" in str(error)
        return
    assert profile.capacity % 64 == 0 and profile.capacity >= MIN_CAPACITY
    assert budget * context <= profile.capacity + 1e-6 and profile.capacity < budget * context + 64
    assert 0 < profile.target < profile.capacity
    # After a compression, at least one whole prefill chunk fits.
    assert profile.target + profile.prefill_chunk <= profile.capacity


@pytest.mark.parametrize("budget", ["1700tokens", "74MiB"])
def test_profile_of_slots_and_bytes(budget: str):
    profile = static_profile(budget, 8192, bytes_per_slot=46080)
    assert (profile.capacity, profile.cache_bytes, profile.label) == (1664, 1664 * 46080, "0.2031 (80 % compression)")

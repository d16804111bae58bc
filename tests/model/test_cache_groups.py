"""Groupings that users give: what they may be, and what is said of those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.budget import budget_profile
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.cache_groups import (
    CacheGroup,
    GroupShare,
    by_layer,
    check_groups,
    is_default,
    one_a_head,
    one_a_layer,
    parse_groups,
    symbols,
)


def test_words_and_files(tmp_path: Path):
    assert parse_groups(None, 2, 3) == parse_groups("layer", 2, 3) == one_a_layer(2, 3)
    assert parse_groups("head", 2, 3) == one_a_head(2, 3)
    groups = [{"layer": 1, "heads": [0]}, {"layer": 0, "heads": [1, 0], "share": 2}, {"layer": 1, "heads": [1]}]
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    parsed = parse_groups(str(tmp_path / "groups.json"), 2, 2)
    assert [(group.layer, group.heads, group.share) for group in parsed] == [(0, (0, 1), 2), (1, (0,), 1), (1, (1,), 1)]
    assert symbols(parsed) == ["capacity_0", "capacity_1", "capacity_1"]
    assert symbols(one_a_layer(2, 3)) == ["capacity"] * 2


def test_groups_of_one_name_have_one_share_at_every_budget():
    whole, fifth = one_a_layer(3, 2), by_layer([1.0, 2.0, 1.0], 2)
    assert symbols(whole, fifth) == ["capacity_0", "capacity_1", "capacity_0"]


def test_the_form_of_exports_is_one_group_a_layer_of_one_capacity():
    def profile(groups: tuple[GroupShare, ...]) -> tuple[CacheGroup, ...]:
        return budget_profile(0.5, 1024, bytes_per_slot=4, groups=groups).groups

    assert is_default(profile(one_a_layer(2, 3)), 2)
    assert not is_default(profile(by_layer([1.0, 2.0], 3)), 2)
    assert not is_default(profile(one_a_head(2, 2)), 2)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not a JSON file of groups"),
        ("[" * 100_000, "not a JSON file of groups"),
        ("{}", "not a list of groups"),
        ('[{"layer": 0}]', "heads: Field required"),
        ('[{"layer": 0, "heads": []}]', "heads: Tuple should have at least 1 item"),
        ('[{"layer": 0, "heads": [0], "share": 0}]', "share: Input should be greater than"),
        ('[{"layer": 0, "heads": [0], "share": 1e308}]', "share: Input should be less than"),
        ('[{"layer": 0, "heads": [0], "share": 1e-308}]', "share: Input should be greater than"),
        ('[{"layer": 0, "heads": [0], "share": NaN}]', "share: Input should be"),
        ('[{"layer": 0, "heads": [0, 1]}]', "head 0 of layer 1 is in no group"),
        ('[{"layer": 0, "heads": [0, 1, 1]}]', "head 1 of layer 0 is in two groups"),
        ('[{"layer": 0, "heads": [0, 1]}, {"layer": 9, "heads": [0]}]', "head 0 of layer 9 does not exist"),
    ],
)
def test_what_is_no_grouping(content: str, words: str, tmp_path: Path):
    path = tmp_path / "groups.json"
    path.write_text(content)
    with pytest.raises(SemkvError) as error:
        parse_groups(str(path), 2, 2)
    assert words in str(error.value) and str(error.value).startswith(f"--cache-groups {path}: ")


def test_a_missing_file_and_a_long_one(tmp_path: Path):
    with pytest.raises(SemkvError, match="--cache-groups heads: no such grouping"):
        parse_groups("heads", 2, 2)
    groups: Any = [GroupShare(layer=layer, heads=(head,)) for layer in range(80) for head in range(8)]
    assert len(check_groups(groups, 80, 8)) == 640

"""Methods as users name them."""

from __future__ import annotations

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.entries import parse_entry
from semkv_deploy.methods import METHODS, SemantiCache


def number(text: str) -> object:
    return float(text) if text.replace(".", "").isdigit() else text


def test_options_are_the_methods_or_the_builds():
    entry = parse_entry("semanticache:recent=0.75,merge-keys=cached,groups=head", number)
    assert entry.method() == SemantiCache(recent=0.75, merge_keys="cached") and entry.build_options == {
        "groups": "head"
    }
    assert entry.text == "semanticache:recent=0.75,merge-keys=cached,groups=head"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_every_registered_method_can_be_named(name: str):
    assert parse_entry(name, number).method() == METHODS[name](kind=name)


def test_what_is_held_while_reading_is_no_option_of_the_method():
    entry = parse_entry("semanticache:hold=all", str)
    assert entry.holds_all and entry.method() == SemantiCache() and entry.build_options == {}
    assert not parse_entry("semanticache:hold=budget", str).holds_all
    assert not parse_entry("semanticache", str).holds_all


def test_commas_inside_a_value_stay():
    assert parse_entry("kvpress/SnapKV:window_size=[1,2],kernel_size=5", str).options == {
        "window_size": "[1,2]",
        "kernel_size": "5",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("other", "unknown method"),
        ("semanticache:recent", "not of the form"),
        ("semanticache:nothing=1", "does not take nothing"),
        ("semanticache:source=1", "does not take source"),
        ("semanticache:hold=some", "expected hold=budget or all, got some"),
        ("semanticache:native=on", "does not take native"),
        ("semanticache:cache_dtype=int4", "expected cache_dtype=float32, float16, bfloat16, int8, got int4"),
        ("dynsplit-select:attend=64", "attends to what the budget allows.*got attend.*Leave it out"),
        ("semanticache:calibration_text=/nowhere.txt", "calibration_text=/nowhere.txt: no such file"),
    ],
)
def test_what_is_no_method_is_refused(text: str, words: str):
    with pytest.raises(SemkvError, match=words):
        parse_entry(text, number)

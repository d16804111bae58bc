"""What the pages show is run, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ..test_layers import FLOORS
from .blocks import ROOT, blocks, check_quotations, page

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_architecture_names_the_rooms_floor_by_floor():
    (floors,) = [block for block in blocks("architecture.md", "text") if block.startswith("cli\n")]
    assert [tuple(line.split()) for line in floors.splitlines()] == list(FLOORS)


def test_architecture_walks_a_budget_as_the_code_does():
    (code,) = check_quotations("architecture.md")
    exec(code, {})
    # The walk of a token counts with the same numbers.
    length, fifth = 4 * 112, 336 + 112
    assert length == fifth == 448 and 5 * 112 + 40 == 600


def test_engine_of_the_page_runs_a_session(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    (code,) = check_quotations("adding_a_target.md")
    exec(code, variables)
    engine, session = variables["engine"], variables["session"]
    assert engine.runs["decode"] > 300 // 128 and engine.runs["compress"] == 2 * session.stats.runs > 0
    names = {name for name in dir(type(engine)) if not name.startswith("_")}
    from semkv_deploy.targets.engine import Engine

    assert names == {name for name in dir(Engine) if not name.startswith("_")}


@pytest.mark.parametrize("name", PAGES)
def test_files_and_links_are_there(name: str):
    text = page(name)
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
    for target in re.findall(r"`((?:semkv_deploy|tests|examples|scripts|methods|runtime|validate)/[\w./-]+)`", text):
        assert (ROOT / target).exists() or (ROOT / "semkv_deploy" / target).exists(), target


def test_number_of_lint_rules():
    from semkv_deploy.lint.tensorrt.rules import RULES

    assert f"the same {len(RULES)} rules" in page("tensorrt.md")


def test_building_names_the_methods_and_a_recipe_that_is_there():
    from semkv_deploy.methods import METHODS

    text = page("building.md")
    listed = set(re.findall(r"^\| `(\w[\w-]*)`", text.partition("## Methods")[2], re.MULTILINE))
    assert listed == set(METHODS)
    (recipe,) = re.findall(r"recipes/[\w./-]+\.yaml", text)
    assert (ROOT / recipe).is_file()

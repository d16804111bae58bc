"""`scripts/foreign_equal.py`, on a tiny model: one row, three turns, and both sides of a step are timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime_genai")


@pytest.fixture
def arguments(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    words = [str(tiny_checkpoint), str(tmp_path / "work"), "--exporter", "genai", "--threads", "1"]
    return [*words, "--reply", "8", "--context", "300", "--steps", "2", "--json", str(tmp_path / "equal.json")]


def test_replies_of_an_import_are_the_originals(arguments: list[str], tmp_path: Path):
    from foreign_equal import main

    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "equal.json").read_text())["genai"]
    assert result["equal"] == [True] * 3 and result["tokens"] == 24
    assert 0 < result["difference"] < 1e-5 < result["margin"], "no choice was so near that rounding may turn it"
    assert result["position"] > 24 and result["decode"]["slots"] == 300
    assert min(result["decode"]["original"], result["decode"]["bundle"]) > 0


def test_it_fails_where_a_reply_differs(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    """An original that forgets its second token."""
    import foreign_equal

    whole = foreign_equal.Original.run

    def forgetful(self: foreign_equal.Original, tokens: list[int]) -> object:
        return whole(self, [tokens[0], tokens[0], *tokens[2:]] if len(tokens) > 1 else tokens)

    monkeypatch.setattr(foreign_equal.Original, "run", forgetful)
    done = CliRunner().invoke(foreign_equal.main, arguments)
    assert done.exit_code == 1 and "False" in done.output

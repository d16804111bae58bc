"""`scripts/foreign_equal.py`, on a tiny model: one row, three turns, and both sides of a step are timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from semkv_deploy import open_session
from semkv_deploy.bundle import Bundle

pytest.importorskip("onnxruntime_genai")


def test_replies_of_an_import_are_the_originals(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import foreign_equal

    words = [str(tiny_checkpoint), str(tmp_path / "work"), "--exporter", "genai", "--threads", "1"]
    words += ["--reply", "8", "--context", "300", "--steps", "2", "--json", str(tmp_path / "equal.json")]
    done = CliRunner().invoke(foreign_equal.main, words)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "equal.json").read_text())["genai"]
    assert result["equal"] == [True] * 3 and result["tokens"] == 24
    assert 0 < result["difference"] < 1e-5 < result["margin"], "no choice was so near that rounding may turn it"
    assert result["position"] > 24 and result["decode"]["slots"] == 300
    assert min(result["decode"]["original"], result["decode"]["bundle"]) > 0

    # An original that forgets its prompts' second token.
    whole = foreign_equal.Original.run

    def forgetful(self: foreign_equal.Original, tokens: list[int]) -> object:
        return whole(self, [tokens[0], tokens[0], *tokens[2:]] if len(tokens) > 1 else tokens)

    monkeypatch.setattr(foreign_equal.Original, "run", forgetful)
    original = foreign_equal.Original(tmp_path / "work" / "genai" / "model.onnx", 512, 1)
    session = open_session(Bundle.open(tmp_path / "work" / "genai-bundle"), budget=1.0)
    assert False in foreign_equal.replies(original, session, [[5, 6, 7, 8], [9, 10, 11]], 8)["equal"]

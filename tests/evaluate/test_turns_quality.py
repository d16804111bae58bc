"""The command that says what isolating turns is worth: on a tiny model, where only its bookkeeping can be checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import turns_quality


def test_both_forms_keep_the_budget_and_isolating_differs(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    chats = tmp_path / "chats.jsonl"
    lines = []
    for number in range(20):
        turns = [f"{word} {number} goes to market and buys a {word}. " for word in ("Ann", "Bob", "hen", "egg")]
        messages = [{"role": ("user", "assistant")[n % 2], "content": turns[n // 2]} for n in range(8)]
        lines.append(json.dumps({"messages": messages}))
    chats.write_text("\n".join(lines), encoding="utf-8")
    given = [str(tiny_export / "decoder.onnx"), "--method", "streaming-llm:sinks=2", "--source", f"mine={chats}"]
    sizes = ["--context", "512", "--tokens", "400", "--dialogues", "2", "--budget", "0.25", "--threads", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["turns_quality.py", *given, *sizes])
    turns_quality.main()
    forms = json.loads(capsys.readouterr().out)["streaming-llm:sinks=2"]["0.25"]
    assert all(row[2] == [] for form in forms.values() for row in form), "chats ask for nothing that was told"
    together, isolated = (np.array([row[:2] for row in forms[form]]) for form in ("together", "isolated"))
    assert together.shape == isolated.shape == (2, 2)
    assert (together[:, 0] > 0).all() and (isolated[:, 0] > 0).all() and (together[:, 0] != isolated[:, 0]).all()
    # A slot for each turn is rounded up to.
    assert (together[:, 1] < 0.27).all() and (isolated[:, 1] < 0.28).all() and (isolated[:, 1] > 0.24).all()


def test_an_answer_is_recalled_when_all_of_it_is_likeliest():
    """Tokens 1 and 2 of the third turn, predicted by what stands before each."""
    logits = [np.eye(9, dtype=np.float32)[[4, 5, 6]]]
    turns = [[0], [0], [3, 4, 5]]
    assert turns_quality.recalled(logits, turns, [(2, 1, 3), (2, 1, 2)]) == [True, True]
    assert turns_quality.recalled(logits, [[0], [0], [3, 4, 7]], [(2, 1, 3), (2, 1, 2)]) == [False, True]


def test_kl_of_the_same_is_0_and_of_others_is_not():
    logits = [np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32)]
    assert turns_quality.divergence(logits, logits) == pytest.approx(0, abs=1e-12)
    assert turns_quality.divergence(logits, [logits[0][:, ::-1]]) > 0.1

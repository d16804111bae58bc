"""`train` as a user runs it: a run that is left and gone on with, and what is wrong with what they give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from semkv_deploy.cli import main
from tests.train.conftest import SMALL


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A recipe whose data is a file of chats."""
    chats = tmp_path / "chats.jsonl"
    said = [{"from": role, "value": f"good day {turn}"} for turn in range(3) for role in ("human", "gpt")]
    line = json.dumps({"conversations": said}) + "\n"
    chats.write_text(line * 8, encoding="utf-8")
    data = {**SMALL["data"], "sources": [{"name": "mine", "path": str(chats)}], "tokens": 400}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": str(tiny_checkpoint), "data": data}), encoding="utf-8")
    return path


def run(*arguments: object) -> str:
    """Output of `train`, in this process: PyTorch is loaded once."""
    result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_is_left_gone_on_with_evaluated_and_finished(recipe: Path, tmp_path: Path):
    out = tmp_path / "sonic"
    left = run(recipe, "-o", out, "--minutes", 0)
    assert "1 of 5 steps" in left and "not finished: go on with --resume" in left
    done = run(recipe, "-o", out, "--resume", "--evaluate", "--examples", 2, "--kept", 0.5)
    assert "5 of 5 steps" in done and "| text | 50% | 0.5" in done and "not finished" not in done
    files = {"adapter.safetensors", "best.safetensors", "checkpoint.pt", "curve.png", "evaluation.json", "log.jsonl"}
    assert files <= {path.name for path in out.iterdir()}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    (out / "adapter.safetensors").unlink()
    run(recipe, "-o", out, "--finish")
    assert (out / "adapter.safetensors").read_bytes() == (out / "best.safetensors").read_bytes()
    again = CliRunner().invoke(main, ["train", str(recipe), "-o", str(out)])
    assert again.exit_code == 1 and "the folder has a run. Go on with --resume" in again.output


def test_what_is_refused_before_anything_is_loaded(recipe: Path, tmp_path: Path):
    broken = tmp_path / "broken.yaml"
    for text, sentence in (
        (None, "broken.yaml: no such file (expected a recipe, such as those in recipes/*-sonic)"),
        ("model: [", "not valid YAML"),
        ("model: x\nstages: []\n", "not a recipe"),
        (recipe.read_text(encoding="utf-8"), "gone: no such checkpoint"),
    ):
        if text is not None:
            broken.write_text(text, encoding="utf-8")
        result = CliRunner().invoke(main, ["train", str(broken), "--model", str(tmp_path / "gone")])
        assert result.exit_code == 1 and sentence in result.output, result.output

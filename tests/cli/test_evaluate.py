"""`evaluate` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

import semkv_deploy
from semkv_deploy.cli.main import main
from semkv_deploy.errors import SemkvError

from .commands import cli


def test_evaluate(tiny_export: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text((Path(semkv_deploy.__file__).parent / "data" / "calibration.txt").read_text())
    command = ["evaluate", tiny_export / "decoder.onnx", "--text", f"prose={text}", "--task", "prose", "--context", 256]
    chosen = ["--method", "semanticache:recent=0.25", "--budget", "0.5", "--examples", 2, "-o", tmp_path / "out"]
    result = cli(*command, *chosen, "--json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert (
        row["method"] == "semanticache:recent=0.25" and row["kept_share"] <= 0.51 and row["tasks"]["prose"]["mean"] > 0
    )
    assert "| semanticache:recent=0.25 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "other"], ["unknown method", "semanticache", "kvpress/"]),
        (["--method", "semanticache:recent"], ["not of the form NAME:OPTION=VALUE"]),
        (["--method", "semanticache:recent=2"], ["semanticache does not take recent"]),
        (["--task", "other"], ["unknown task", "prose or code"]),
        (["--budget", "20MiB"], ["not a share below 1"]),
        (["--context", "4096"], ["beyond the model", "at most 416 tokens"]),
        (["--text", "prose=missing.txt"], ["no such file"]),
        (["--text", "prose"], ["not of the form NAME=FILE"]),
        (["--method", "kvpress/SnapKV", "--kvpress-python", "missing"], ["kvpress works on transformers' model"]),
    ],
)
def test_evaluate_refuses(tiny_export: Path, tmp_path: Path, options: list[str], words: list[str]):

    text = tmp_path / "text.txt"
    text.write_text("words and words " * 400)
    command = ["evaluate", str(tiny_export / "decoder.onnx"), "-o", str(tmp_path / "out"), "--examples", "2"]
    if "--text" not in options:
        command += ["--text", f"prose={text}"]
    result = CliRunner().invoke(main, [*command, "--task", "prose", "--context", "256", *options])
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.output, result.output


@pytest.mark.parametrize(
    ("options", "methods", "tasks", "context"),
    [
        ([], ["importance", "semanticache", "streaming-llm"], ["prose", "passkey", "facts"], 512),
        (["--method", "sonic", "--task", "code", "--context", "256"], ["sonic"], ["code"], 256),
    ],
)
def test_quick_leaves_what_was_chosen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    methods: list[str],
    tasks: list[str],
    context: int,
):
    plans = []

    def plan_only(plan: Any, progress: Any) -> NoReturn:
        plans.append(plan)
        raise SemkvError("no more than the plan is wanted")

    monkeypatch.setattr("semkv_deploy.evaluate.run.evaluate", plan_only)
    CliRunner().invoke(main, ["evaluate", "model", "-o", str(tmp_path), "--quick", *options])
    (plan,) = plans
    assert [entry.text for entry in plan.methods] == methods and [task.name for task in plan.tasks] == tasks
    assert (plan.context, plan.examples, plan.budgets) == (context, 4, [0.5, 0.2])

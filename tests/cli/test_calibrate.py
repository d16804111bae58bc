"""`calibrate` as a user runs it, and what it and `build --calibration` do not take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .commands import cli, refused


def test_weights_go_from_one_command_to_the_other(tiny_export: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("One, two; three. Four, five! Six? " * 20)
    decoder, out = tiny_export / "decoder.onnx", tmp_path / "weights.json"
    done = cli("calibrate", decoder, "--method", "dynsplit", "--text", f"prose={text}", "-o", out)
    assert done.returncode == 0 and "1 domains" in done.stdout, done.stderr
    table = json.loads(out.read_text())
    assert [domain["name"] for domain in table["domains"]] == ["prose"] and table["vocab_size"] == 512
    budget = ["--budget", "0.25", "--weights", "fp32", "--calibration", out]
    built = cli("build", decoder, "--method", "dynsplit", *budget, "-o", tmp_path / "bundle")
    assert built.returncode == 0, built.stderr
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert manifest["calibration"]["table"] == table
    refused(cli("build", decoder, "--method", "importance", *budget, "-o", tmp_path / "x"), "weighs no delimiters")
    out.write_text(out.read_text().replace("weights", "wages"))
    refused(cli("build", decoder, "--method", "dynsplit", *budget, "-o", tmp_path / "x"), "not a calibration of")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "prose"], ["--text", "not of the form DOMAIN=FILE"]),
        (["--text", "prose=nowhere.txt"], ["no such file", "nowhere.txt"]),
        (["--method-option", "search=9"], ["search is at most a quarter of block, 4"]),
        (["--method-option", "blocks=fixed"], ["weighs no delimiters"]),
        (["--method-option", "domain=poems"], ["no weights for the domain", "prose or code or chat or cjk"]),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], words: list[str], tiny_export: Path, tmp_path: Path):
    out = tmp_path / "weights.json"
    refused(cli("calibrate", tiny_export / "decoder.onnx", "--method", "dynsplit", *arguments, "-o", out), *words)
    assert not out.exists()

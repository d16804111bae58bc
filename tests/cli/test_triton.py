"""The command as a user runs it: a repository that is whole, or one sentence and nothing."""

from __future__ import annotations

from pathlib import Path

from .commands import cli, nothing_left, refused


def test_it_writes_a_model_and_says_how_to_run_it(tiny_bundle: Path, tmp_path: Path):
    result = cli("triton", tiny_bundle, "-o", tmp_path / "r", "--name", "chat", "--budget", "0.5", "--rows", 3)
    assert result.returncode == 0, result.stderr
    model = tmp_path / "r" / "chat"
    assert result.stdout == f"{model}: run it with: tritonserver --model-repository={tmp_path / 'r'}\n"
    config = (model / "config.pbtxt").read_text(encoding="utf-8")
    assert '"budget", value { string_value: "0.5" }' in config and '"rows", value { string_value: "3" }' in config
    assert (model / "1" / "model.py").is_file() and (model / "1" / "bundle" / "bundle.json").is_file()
    again = cli("triton", tiny_bundle, "-o", tmp_path / "r", "--name", "chat", "--backend", "cpp", "--force")
    assert again.returncode == 0 and again.stdout.endswith("which has semkv/libtriton_semkv.so\n"), again.stderr
    assert 'backend: "semkv"' in (model / "config.pbtxt").read_text(encoding="utf-8")


def test_what_is_refused_leaves_nothing(tiny_bundle: Path, tmp_path: Path):
    refused(cli("triton", tiny_bundle, "-o", tmp_path, "--name", "a/b"), "--name: not a name for a model")
    refused(cli("triton", tmp_path, "-o", tmp_path / "r"), "not a bundle")
    refused(cli("triton", tiny_bundle, "-o", tmp_path, "--budget", "0.3"), "the bundle has no such budget")
    nothing_left(tmp_path)

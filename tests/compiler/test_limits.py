"""Builds that would not be sound stop: before the work for a kernel's limit, after it for numbers that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from semkv_deploy.compiler.limits import check_finite, check_head_size, check_source_limits
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import SemantiCache


@pytest.mark.parametrize("size", [4, 12, 20, 0, -8])
def test_head_sizes_without_a_kernel(size: int):
    with pytest.raises(SemkvError, match=f"a multiple of 8, got {size}"):
        check_head_size(size, "m")


@pytest.mark.parametrize("size", [8, 64, 80, 96, 256])
def test_head_sizes_with_one(size: int):
    check_head_size(size, "m")


def test_a_head_size_stops_before_weights_are_read(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 48, "num_attention_heads": 4}))
    with pytest.raises(SemkvError, match="a multiple of 8, got 12"):
        build_bundle(str(tmp_path), tmp_path / "out", budgets=[0.5], method=SemantiCache())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"text_config": 3}', "[" * 100_000, '{"head_dim": "x"}'])
def test_a_config_that_says_nothing_is_left_to_its_loading(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text)
    check_source_limits(str(tmp_path))


def test_logits_that_are_no_numbers():
    logits = np.zeros((5, 7), np.float32)
    check_finite(logits, "m")
    logits[3, 2], logits[4, 1] = np.inf, np.nan
    with pytest.raises(SemkvError, match="2 of 5 tokens, the first at token 3"):
        check_finite(logits, "m")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_build_of_weights_that_are_no_numbers_stops(value: float, tiny_export: Path, tmp_path: Path):
    """The export was whole; its weights were changed afterwards."""
    folder = tmp_path / "export"
    shutil.copytree(tiny_export, folder)
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    norm = next(t for t in graph.graph.initializer if len(t.dims) == 2)
    record = {entry.key: entry.value for entry in norm.external_data}
    with (folder / record["location"]).open("r+b") as file:
        file.seek(int(record.get("offset", 0)))
        file.write(np.full(4096, value, np.float32).tobytes())
    with pytest.raises(SemkvError, match="logits are not finite numbers"):
        build_bundle(
            str(folder / "decoder.onnx"), tmp_path / "out", budgets=[0.5], method=SemantiCache(), weights="fp32"
        )
    assert not (tmp_path / "out").exists()

"""Seconds of scripts/fuzz.py with fixed seeds; hours of it are a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_gguf_at

fuzz: Any = pytest.importorskip("fuzz")

CASES = {"template": 4, "safetensors": 8, "checkpoint": 6, "bundle": 12, "manifest": 15}
"""Of each kind; others are quick."""


@pytest.fixture(scope="module")
def samples(
    tiny_export: Path, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    gguf = tiny_gguf_at(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return fuzz.Samples(tiny_export, tiny_bundle, tiny_checkpoint, gguf)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_input_ends_in_a_sentence(kind: str, samples: Any):
    assert fuzz.run(samples, [kind], 0, CASES.get(kind, 40), None) == {}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (lambda samples, folder, random: 1 // 0, "ZeroDivisionError"),
        (lambda samples, folder, random: (folder.parent / "bystander").write_text("x"), "files changed"),
        (lambda samples, folder, random: (samples.bundle / "new").write_text("x"), "files changed in bundle"),
    ],
)
def test_the_fuzzer_sees_faults(case: Any, words: str, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    shutil.copytree(samples.bundle, tmp_path / "bundle")
    monkeypatch.setitem(fuzz.KINDS, "broken", case)
    (tmp_path / "around").mkdir()
    fault = fuzz.one("broken", 0, samples._replace(bundle=tmp_path / "bundle"), tmp_path / "around")
    assert fault is not None and words in fault


def test_the_fuzzer_sees_a_hang(samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import time

    monkeypatch.setitem(fuzz.KINDS, "broken", lambda samples, folder, random: time.sleep(9))
    monkeypatch.setattr(fuzz, "LIMIT", 1)
    assert fuzz.one("broken", 0, samples, tmp_path) == "takes longer than 1 s"

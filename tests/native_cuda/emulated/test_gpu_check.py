"""What scripts/gpu_check.sh runs in ONNX Runtime on a GPU, on the emulated library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "plugins" / "gpu_check"))

import onnxruntime_check


def test_every_operator_passes(cuda_library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert onnxruntime_check.main(["--library", str(cuda_library), "--device", "cpu", "--cases", "2"]) == 0
    assert "10 cases in ONNX Runtime on cpu, 0 failed" in capsys.readouterr().out


def test_a_wrong_result_is_said(
    cuda_library: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_check.compact_cache, "reference", lambda *inputs: (*inputs[:3], inputs[3][:, 0, 0]))
    monkeypatch.setattr(onnxruntime_check, "CASES", {"CompactCache": onnxruntime_check.compaction})
    assert onnxruntime_check.main(["--library", str(cuda_library), "--device", "cpu", "--cases", "1"]) == 1
    assert "CompactCache seed 1: output 0" in capsys.readouterr().out

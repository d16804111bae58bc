"""scripts/gpu_check.sh where there is no GPU, and its Python part in miniature on the emulated kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), "--json", str(result)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    assert "no GPU: skipped" in done.stdout
    assert json.loads(result.read_text()) == {"skipped": "no GPU"}


def test_dry_run_fills_every_field(emulated_kernels: Path, tmp_path: Path) -> None:
    libasan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    result = tmp_path / "result.json"
    script = ROOT / "plugins" / "gpu_check" / "check.py"
    done = subprocess.run(
        [sys.executable, str(script), "--library", str(emulated_kernels), "--dry-run", "--json", str(result)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": libasan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(result.read_text())
    assert report["sweep"]["cases"] == 8 and report["sweep"]["failures"] == []
    assert len(report["decode"]) == 2
    for row in report["decode"]:
        assert {"ms_1", "ms_0.5", "ms_0.2", "share_1", "ms_flash", "ms_flashinfer"} <= set(row)
    assert report["compaction"]["cluster_length"] <= 128 and report["compaction"]["cluster_level"] >= 0
    assert {"map_ms", "select_ms", "map_floor_ms", "select_floor_ms"} <= set(report["blocks"])
    for variant in ("plain", "mass", "int8", "fp8", "indexed 0.2", "indexed 0.2 int8"):
        assert {f"ms {variant}", f"share {variant}"} <= set(report["options"])
    assert "copy bandwidth" in done.stdout

"""The kernels' own sources, run on the CPU under sanitizers, against the operators' PyTorch references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def worker(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    libasan = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": libasan,
        "ASAN_OPTIONS": "detect_leaks=0:allow_user_poisoning=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "kernel_worker.py"), str(library), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("operator", "cases", "architecture"),
    # 120 cases of NexusAttention are every head size, element type and GQA group of 1 to 8 once. Below sm_80 the kernel
    # without tensor cores takes all of them.
    [
        ("nexus_attention", 168, 80),
        ("nexus_attention", 120, 75),
        # Eleven sets of options, in turn.
        ("nexus_attention_options", 264, 80),
        ("nexus_attention_options", 132, 75),
        ("compact_cache", 24, 80),
        ("semantic_cluster", 32, 80),
        ("semantic_block_map", 60, 80),
        ("semantic_block_select", 96, 80),
    ],
)
def test_kernels_equal_the_reference(emulated_kernels: Path, operator: str, cases: int, architecture: int) -> None:
    done = worker(emulated_kernels, operator, str(cases), str(architecture))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["cases"] == cases
    assert not result["failures"], "\n".join(result["failures"])


def test_blocks_from_map_to_attention(emulated_kernels: Path) -> None:
    done = worker(emulated_kernels, "blocks")
    assert done.returncode == 0, done.stderr[-4000:]


def test_caches_of_many_tiles(emulated_kernels: Path) -> None:
    done = worker(emulated_kernels, "large")
    assert done.returncode == 0, done.stderr[-4000:]


def test_impossible_lengths_of_a_cluster(emulated_kernels: Path) -> None:
    done = worker(emulated_kernels, "lengths")
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_architecture_chooses_the_kernel(emulated_kernels: Path) -> None:
    done = worker(emulated_kernels, "architectures")
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_sanitizer_watches_the_kernels(emulated_kernels: Path) -> None:
    done = worker(emulated_kernels, "overflow")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr

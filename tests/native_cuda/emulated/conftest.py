"""Tests on the emulated kernels, which run in a process under the address sanitizer: `test_emulated.py` starts it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CUDA, CPU = "SEMKV_TEST_CUDA_LIBRARY", "SEMKV_TEST_CPU_LIBRARY"
"""Variables with the libraries' paths: nothing is built in that process."""

if CUDA not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The operators over the CUDA kernels, emulated: for the CPU provider."""
    return Path(os.environ[CUDA])


@pytest.fixture(scope="session")
def native_library() -> Path:
    """The operators that are made for a CPU."""
    return Path(os.environ[CPU])

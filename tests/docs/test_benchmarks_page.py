"""What the page shows is run, and its columns are those of the table."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from semkv_deploy.bench.table import columns
from semkv_deploy.cli.bench import bench

from ..bench.conftest import cell
from .blocks import ROOT, blocks, page

PAGE = "benchmarks.md"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_commands_of_the_page(number: int, tiny_bundle: Path, tmp_path: Path):
    line = blocks(PAGE, "sh")[0].splitlines()[number]
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    command = [sys.executable, "-m", "semkv_deploy.cli", *shlex.split(line)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "250"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for picture in re.findall(r"\w+\.png", line):
        assert (tmp_path / picture).is_file()
    assert "budget 0.25" in done.stdout


def test_options_of_larger_runs_are_there():
    text = "".join(blocks(PAGE, "text")).replace("\\\n", " ")
    for line in text.splitlines():
        assert bench.make_context("bench", shlex.split(line)[2:]).params["bundles"]


def test_the_page_explains_every_column():
    explained = re.findall(r"^\| `([^`]+)` \|", page(PAGE), re.MULTILINE)
    turn = {"seen": 1, "ttft_s": 1.0, "tpot_ms": 1.0, "live_slots": 1.0}
    everything = columns([cell("budget 1", 1.0, [1.0], batch=2, turns=[turn, turn])])
    shown = [title for title, _ in everything if title not in ("", "context")]
    assert explained == shown


def test_the_page_names_every_option_that_is_benchs_own():
    own = {"--context", "--batch", "--rounds", "--tokens", "--turns", "--prefills", "--genai", "--llama-cpp", "--plot"}
    options = {option for parameter in bench.params if isinstance(parameter, click.Option) for option in parameter.opts}
    assert own < options
    assert all(option in page(PAGE) for option in own | {"--transformers", "--threads", "--json"})

"""Stock Polygraphy on our files, as its users call it: `run --onnxrt`, `inspect model`, `convert` for TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.validate.stock import RTX_ENVIRONMENT, Command, commands


@pytest.fixture(scope="module")
def found(both_targets: Path) -> list[Command]:
    return commands(Bundle.open(both_targets), 0.25)


def run(command: Command, cwd: Path, folder: Path) -> str:
    """Runs a command in the bundle, output files to `folder`; returns what it printed."""
    program = Path(sys.executable).with_name("polygraphy")
    argv = [str(program), *command.argv[1:]]
    if "-o" in argv:
        at = argv.index("-o") + 1
        argv[at] = str(folder / argv[at])
    environment = {**os.environ, **command.environment}
    if command.environment and importlib.util.find_spec("tensorrt_rtx") is None:
        # All that the package tensorrt-rtx-cu13 adds to its bindings is this module.
        (folder / "tensorrt_rtx").mkdir()
        lines = "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
        (folder / "tensorrt_rtx" / "__init__.py").write_text(lines, encoding="utf-8")
        environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_inspect_shows_the_operators(found: list[Command], both_targets: Path, tmp_path: Path):
    printed = run(found[0], both_targets, tmp_path)
    assert "'semkv': 1" in printed and "past_key_values.01.value" in printed


@pytest.mark.parametrize(
    "graph",
    [
        "onnx/decoder.onnx",
        "onnx/compressor.onnx",
        "targets/onnxruntime-cpu/decoder.onnx",
        "targets/tensorrt-rtx/decoder.0.25.onnx",
        "targets/tensorrt-rtx/compressor.0.25.onnx",
    ],
)
def test_run_in_onnxruntime(graph: str, found: list[Command], both_targets: Path, tmp_path: Path):
    (command,) = [each for each in found if each.argv[1] == "run" and each.argv[2] == graph]
    printed = run(command, both_targets, tmp_path)
    assert "PASSED" in printed and ("logits" in printed or "slot_bias_out" in printed)


@pytest.mark.parametrize("graph", ["decoder", "compressor"])
def test_convert_for_tensorrt_rtx(graph: str, found: list[Command], both_targets: Path, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx_bindings")
    path = f"targets/tensorrt-rtx/{graph}.0.25.onnx"
    (command,) = [each for each in found if each.argv[1] == "convert" and each.argv[2] == path]
    assert command.environment == {RTX_ENVIRONMENT: "1"}
    run(command, both_targets, tmp_path)
    assert (tmp_path / f"{graph}.0.25.plan").stat().st_size > 10_000


def test_the_bundle_is_as_it_was(both_targets: Path):
    Bundle.open(both_targets)

"""Everything the README shows is run: its shell block and its Python block, in a folder with the model in it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_commands_and_code(smollm2_gguf: Path, tmp_path: Path):
    (tmp_path / smollm2_gguf.name).symlink_to(smollm2_gguf)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    usage, tensorrt = [block for block in blocks("sh") if "semkv-deploy" in block]

    def run(commands: str) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-euo", "pipefail", "-c", commands]
        return subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = run(usage)
    assert done.returncode == 0, done.stderr
    assert "0.2 (80 % compression)" in done.stdout and "tokens seen" in done.stderr
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reply, state = done.stdout.rsplit("\n[", 1)
    assert reply.strip() and "CompressionStats(runs=0" in state
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        return
    done = run(tensorrt)
    assert done.returncode == 0, done.stderr
    assert "30 fused + 60 append" in done.stdout and "nothing found" in done.stdout
    assert (tmp_path / "reports" / "validate.html").is_file()


def test_scripts_it_names_exist():
    (first,) = [block for block in blocks("sh") if "scripts/" in block]
    for script in re.findall(r"scripts/\w+\.sh", first):
        assert os.access(README.parent / script, os.X_OK), script


def test_commands_it_lists_are_the_commands_there_are():
    from semkv_deploy.cli.main import COMMANDS

    listed = set(re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == set(COMMANDS)

"""Everything the README shows is run: its shell block and its Python block, in a folder with the model in it."""

from __future__ import annotations

import importlib.util
import json
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


def test_the_table_of_times_is_the_run_that_is_kept():
    """`recipes/smollm2-135m/bench.json`, a cell a row."""
    output = json.loads((README.parent / "recipes/smollm2-135m/bench.json").read_text(encoding="utf-8"))
    lines = README.read_text(encoding="utf-8").split("| | cache | ms/token |")[1].split("\n\n")[0]
    shown = {tuple(cell.strip() for cell in line.strip("| ").split("|")) for line in lines.splitlines()[2:]}
    kept = set()
    for cell in output["cells"]:
        peer = cell["budget"] is None
        name = f"{cell['name'].split()[0]}, full cache" if peer else f"budget {cell['budget']:g}"
        spent, peak = cell.get("compress_s"), cell.get("peak_mib")
        kept.add((
            name, cell["cache"], f"{cell['tpot_ms']['median']:.1f}", f"{cell['ttft_s']['median']:.1f}",
            f"{spent:.1f}" if spent else "–", f"{cell['read_mib']:.0f}", "–" if peak is None else f"{peak:.0f}",
        ))  # fmt: skip
    assert shown == kept
    of = {cell["name"]: cell["tpot_ms"]["median"] for cell in output["cells"]}
    assert output["cells"] and all(cell["context"] == 8192 for cell in output["cells"])
    ours = of["float16, budget 0.2"]
    found = [
        of[name] / ours for name in ("llama.cpp f16", "onnxruntime-genai", "float32, budget 1", "float16, budget 1")
    ]
    text = " ".join(README.read_text(encoding="utf-8").split())
    words = "llama.cpp's faster one {:.1f}, onnxruntime-genai's {:.1f}, our own float32 one {:.1f}, float16 one {:.1f}."
    assert words.format(*found) in text

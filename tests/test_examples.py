"""Every example runs as its first lines say, in a process of its own, and does what it says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from semkv_deploy import open_bundle, open_session

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = "One day a farmer found a bell in his field. He rang it, and everyone came to listen. "


def run(name: str, *arguments: object, stdin: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stream_a_chat(tiny_bundle: Path):
    out = run(
        "stream_a_chat.py", tiny_bundle, "--budget", "0.25", "--max-new-tokens", 12, stdin=f"{TEXT * 3}\nAnd then?\n"
    )
    seen = [tuple(map(int, pair)) for pair in re.findall(r"\[(\d+) tokens seen, (\d+) slots used\]", out)]
    assert len(seen) == 2 and seen[1][0] > seen[0][0] and seen[1][1] <= 128


def test_batch_of_prompts(tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text(f"{TEXT * 6}\n\nWhy?\n", encoding="utf-8")
    out = run("batch_of_prompts.py", tiny_bundle, tmp_path / "prompts.txt", "--max-new-tokens", 8)
    (long_seen, long_used), (short_seen, short_used) = re.findall(r"(\d+) tokens seen, (\d+) slots", out)
    assert int(long_seen) > int(long_used) and int(short_seen) == int(short_used) and "Why?" in out


def test_save_and_load_a_session(tiny_bundle: Path, tmp_path: Path):
    document, state = tmp_path / "document.txt", tmp_path / "read.safetensors"
    document.write_text(TEXT * 5, encoding="utf-8")
    arguments = (tiny_bundle, document, "--state", state, "--max-new-tokens", 8, "--question", "Who came?")
    first, second = run("save_and_load_a_session.py", *arguments), run("save_and_load_a_session.py", *arguments)
    read, _, reply = first.partition("\n")
    assert read == f"[read {re.findall(r'[0-9]+', read)[0]} tokens, saved {state.stat().st_size} bytes]"
    assert second == reply and reply.strip()
    state.unlink()
    whole = run("save_and_load_a_session.py", *arguments, "--whole")
    assert whole.startswith(read.partition(",")[0]) and whole != first, "the same tokens, compressed once"


@pytest.mark.parametrize("number, budget", [(0, 0.25), (2, 1.0)])
def test_host_without_semkv(tiny_bundle: Path, number: int, budget: float):
    prompt = [5 + i % 60 for i in range(150)]
    session = open_session(open_bundle(tiny_bundle), budget=budget)
    (expected,) = session.generate(prompt, max_new_tokens=10, stop_ids=session.contract.stop_ids)
    ids = ",".join(map(str, prompt))
    out = run("host_without_semkv.py", tiny_bundle, "--ids", ids, "--budget", number, "--max-new-tokens", 10)
    tokens, state = out.splitlines()
    assert tokens == ",".join(map(str, expected))
    assert state == (
        f"[{session.position[0]} tokens seen, {session.kept_slots[0]} slots used, {session.stats.runs} compressions]"
    )


def test_hosts_know_nothing_of_the_package():
    for name in ("host_without_semkv.py", "contract_host.py"):
        tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
        allowed = {
            "__future__",
            "argparse",
            "json",
            "math",
            "pathlib",
            "typing",
            "numpy",
            "numpy.typing",
            "onnxruntime",
        }
        assert names <= allowed | {"contract_host"}, name


def test_each_is_short_says_how_it_is_called_and_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert f"`{path.name}`" in listed
        if path.name != "contract_host.py":
            assert len(source.splitlines()) <= 60, path.name
            assert f"python examples/{path.name} bundle/" in (ast.get_docstring(ast.parse(source)) or ""), path.name

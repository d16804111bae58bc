"""What the page shows is run, and its tables are those of the code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy import open_bundle, open_session
from semkv_deploy.serve.triton.inputs import INPUTS, OUTPUTS

from ..runtime_cpp.conftest import built_alone
from .blocks import ROOT, blocks, check_quotations, page

PAGE = "serving.md"


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """With what the page's commands want: a bundle, examples, and the command itself."""
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = tmp_path / "bin" / "semkv-deploy"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m semkv_deploy.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return tmp_path


def run(commands: str, folder: Path, seconds: int = 120) -> str:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-euo", "pipefail", "-c", commands]
    given: Any = {"cwd": folder, "env": environment, "timeout": seconds}
    done = subprocess.run(shell, capture_output=True, text=True, check=False, **given)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_http(folder: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    out = run(blocks(PAGE, "sh")[0].replace("8000", str(port)), folder)
    assert f"bundle: http://127.0.0.1:{port}/v1 (budget 0.25 (75 % compression), 4 rows" in out
    assert '"object":"chat.completion"' in out
    first, second = re.findall(r"\[(\d+) tokens, (\d+) of them in the cache already\]", out)
    assert first[1] == "0" < second[1] and int(second[1]) < int(second[0])


def test_triton(folder: Path):
    run(blocks(PAGE, "sh")[1], folder)
    assert (folder / "repository" / "chat" / "1" / "bundle" / "bundle.json").is_file()


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="no onnxruntime-genai")
def test_cpp(folder: Path):
    """The library is built and installed, the examples on it; ids and texts go in, and the same texts come back."""
    with built_alone():
        commands = blocks(PAGE, "sh")[2].replace("scripts/", f"{ROOT}/scripts/")
        out = run(commands, folder, seconds=600)  # a compiler on a busy machine
    found = re.search(r"^((?:\d+ ){16})\n(> .*)", out, re.M | re.S)
    assert found is not None and "build_runtime: done, " in out, out
    ids, texts = found.groups()
    of_python, of_cpp = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    assert of_python == of_cpp
    session = open_session(open_bundle(folder / "bundle"))
    assert [list(map(int, ids.split()))] == session.generate([5, 6, 7, 8, 9], max_new_tokens=16)
    assert of_python.startswith("> Why is the sky blue?\n") and "\n> And at night?\n" in of_python


def test_quotations_and_tables():
    assert check_quotations(PAGE) == []
    for language, comment in (("cpp", "// "), ("yaml", "# ")):
        for quoted in blocks(PAGE, language):
            first, _, rest = quoted.partition("\n")
            assert rest in (ROOT / first.removeprefix(comment)).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([A-Z0-9]+)( \[…\])? \| (.+) \|$", page(PAGE), re.MULTILINE)
    assert [(name, kind, -1 if several else 1, says) for name, kind, several, says in rows] == [
        (each.name, each.type, each.size, each.says) for each in (*INPUTS, *OUTPUTS)
    ]

"""scripts/build_native.sh: where it looks for headers, and what it says when they are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_native.sh"
TOOLS = ["bash", "cat", "dirname", "mkdir", "mktemp", "mv", "rm", "sed", "tar"]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with the shell's tools only: no npm, no compiler, an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash") or "bash"
    return subprocess.run([bash, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def onnxruntime_at(root: Path) -> str:
    (root / "include").mkdir(parents=True)
    (root / "include" / "onnxruntime_c_api.h").write_text("")
    return str(root)


def highway_at(root: Path, minor: int) -> str:
    (root / "include" / "hwy").mkdir(parents=True)
    text = f"#define HWY_MAJOR 1\n#define HWY_MINOR {minor}\n"
    (root / "include" / "hwy" / "base.h").write_text(text)
    return str(root)


def npm_at(folder: Path, package: Path) -> None:
    """An npm that packs what is there, and notes each call."""
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\necho "$@" >>"{package.parent}/calls"\ncp "{package}" "$4"\n')
    npm.chmod(0o755)
    (folder / "cp").symlink_to(shutil.which("cp") or "cp")
    (folder / "sh").symlink_to(shutil.which("sh") or "sh")
    (folder / "gzip").symlink_to(shutil.which("gzip") or "gzip")


def test_roots_come_first(bare: dict[str, str], tmp_path: Path) -> None:
    roots = {"ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "HIGHWAY_ROOT": highway_at(tmp_path / "hwy", 2)}
    done = run({**bare, **roots}, "--print-headers")
    assert done.stdout.split() == [str(tmp_path / "ort" / "include"), str(tmp_path / "hwy" / "include")], done.stderr


def test_a_root_without_headers_is_an_error(bare: dict[str, str], tmp_path: Path) -> None:
    done = run({**bare, "ONNXRUNTIME_ROOT": str(tmp_path)}, "--print-headers")
    assert done.returncode != 0
    assert f"expected the folder of a release of ONNX Runtime, got '{tmp_path}'" in done.stderr


def test_highway_that_is_too_old_is_an_error(bare: dict[str, str], tmp_path: Path) -> None:
    roots = {"ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "HIGHWAY_ROOT": highway_at(tmp_path / "hwy", 0)}
    done = run({**bare, **roots}, "--print-headers")
    assert done.returncode != 0 and "no include/hwy/base.h of version 1.1 or newer" in done.stderr


@pytest.mark.skipif(Path("/usr/include/onnxruntime").exists(), reason="headers are installed here")
def test_neither_headers_nor_npm(bare: dict[str, str]) -> None:
    done = run(bare, "--print-headers")
    assert done.returncode != 0
    assert "no ONNX Runtime headers: set ONNXRUNTIME_ROOT" in done.stderr
    assert list(Path(bare["XDG_CACHE_HOME"], "semkv-deploy").iterdir()) == []


@pytest.mark.skipif(Path("/usr/include/hwy").exists(), reason="headers are installed here")
def test_npm_is_asked_once(bare: dict[str, str], tmp_path: Path) -> None:
    inside = tmp_path / "package" / "include" / "hwy"
    inside.mkdir(parents=True)
    (inside / "base.h").write_text("#define HWY_MAJOR 1\n#define HWY_MINOR 4\n")
    archive = tmp_path / "package.tgz"
    subprocess.run(["tar", "-czf", str(archive), "-C", str(tmp_path), "package"], check=True)
    npm_at(Path(bare["PATH"]), archive)
    environment = {**bare, "ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort")}
    for _ in range(2):
        done = run(environment, "--print-headers")
        folder = Path(done.stdout.split()[1])
        assert (folder / "hwy" / "base.h").is_file(), done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_without_a_compiler_it_says_so(bare: dict[str, str], tmp_path: Path) -> None:
    roots = {"ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "HIGHWAY_ROOT": highway_at(tmp_path / "hwy", 4)}
    done = run({**bare, **roots}, "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "no cmake: expected a C++17 compiler and cmake on PATH" in done.stderr


def test_options_that_are_not(bare: dict[str, str]) -> None:
    assert "unknown option '--fast'" in run(bare, "--fast").stderr
    assert "option --jobs: expected a value" in run(bare, "--jobs").stderr
    assert "Builds plugins/onnxruntime/" in run({**os.environ}, "--help").stdout


def test_operators_for_cuda_take_nvcc(bare: dict[str, str], tmp_path: Path) -> None:
    environment = {
        **bare,
        "ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"),
        "CUDA_TOOLKITS": str(tmp_path),
        "PYTHON": "/no/python",
    }
    done = run(environment, "cuda")
    assert done.returncode != 0 and "no nvcc: expected it in CUDACXX, on PATH" in done.stderr
    assert "unknown option '--fast'" in run(environment, "cuda", "--fast").stderr

"""scripts/build_runtime.sh: where it looks for headers, and what it says when they are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..native.test_build_script import bare, onnxruntime_at  # noqa: F401

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_runtime.sh"


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash") or "bash"
    return subprocess.run([bash, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def json_at(root: Path) -> str:
    (root / "include" / "nlohmann").mkdir(parents=True)
    (root / "include" / "nlohmann" / "json.hpp").write_text("")
    return str(root)


def test_roots_come_first(bare: dict[str, str], tmp_path: Path):  # noqa: F811
    roots = {"ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "NLOHMANN_JSON_ROOT": json_at(tmp_path / "json")}
    done = run({**bare, **roots}, "--print-headers")
    assert done.stdout.split() == [str(tmp_path / "ort" / "include"), str(tmp_path / "json" / "include")], done.stderr


@pytest.mark.skipif(Path("/usr/include/nlohmann").exists(), reason="headers are installed here")
def test_a_wheel_is_asked_for_once(bare: dict[str, str], tmp_path: Path):  # noqa: F811
    """By the pip of $PYTHON; a stand-in here, which notes its calls."""
    inside = tmp_path / "nlohmann_json" / "include" / "nlohmann"
    inside.mkdir(parents=True)
    (inside / "json.hpp").write_text("")
    subprocess.run([sys.executable, "-m", "zipfile", "-c", "json.whl", "nlohmann_json"], cwd=tmp_path, check=True)
    python = tmp_path / "python"
    python.write_text(
        f"#!{shutil.which('bash')}\n"
        f'if [ "$2" = zipfile ]; then exec {sys.executable} "$@"; fi\n'
        f'echo "$@" >>{tmp_path}/calls\nwhile [ "$1" != -d ]; do shift; done\n'
        f'{shutil.which("cp")} {tmp_path}/json.whl "$2"\n'
    )
    python.chmod(0o755)
    environment = {**bare, "ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "PYTHON": str(python)}
    for _ in range(2):
        done = run(environment, "--print-headers")
        folder = Path(done.stdout.split()[1])
        assert (folder / "nlohmann" / "json.hpp").is_file(), done.stderr
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--no-deps" in call and call.endswith("nlohmann-json==3.12.0")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.skipif(Path("/usr/include/nlohmann").exists(), reason="headers are installed here")
def test_neither_headers_nor_pip(bare: dict[str, str], tmp_path: Path):  # noqa: F811
    environment = {**bare, "ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "PYTHON": str(tmp_path / "none")}
    done = run(environment, "--print-headers")
    assert done.returncode != 0 and "no nlohmann-json headers: set NLOHMANN_JSON_ROOT" in done.stderr
    assert list(Path(bare["XDG_CACHE_HOME"], "semkv-deploy").iterdir()) == []


def test_a_root_without_headers_is_an_error(bare: dict[str, str], tmp_path: Path):  # noqa: F811
    environment = {**bare, "ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "NLOHMANN_JSON_ROOT": str(tmp_path)}
    done = run(environment, "--print-headers")
    assert done.returncode != 0 and f"no include/nlohmann/json.hpp: got '{tmp_path}'" in done.stderr


def test_without_a_compiler_it_says_so(bare: dict[str, str], tmp_path: Path):  # noqa: F811
    roots = {"ONNXRUNTIME_ROOT": onnxruntime_at(tmp_path / "ort"), "NLOHMANN_JSON_ROOT": json_at(tmp_path / "json")}
    done = run({**bare, **roots}, "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "no cmake: expected a C++17 compiler and cmake on PATH" in done.stderr


def test_options_that_are_not(bare: dict[str, str]):  # noqa: F811
    assert "unknown option '--fast'" in run(bare, "--fast").stderr
    assert "option --prefix: expected a value" in run(bare, "--prefix").stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(("preset", "sanitizers"), [("release", ""), ("asan", "address,undefined"), ("tsan", "thread")])
def test_presets_are_what_the_script_builds(preset: str, sanitizers: str, tmp_path: Path):
    """For those who call cmake themselves, with headers named by the same variables."""
    (tmp_path / "ort" / "include").mkdir(parents=True)
    (tmp_path / "ort" / "include" / "onnxruntime_c_api.h").touch()
    roots = {"ONNXRUNTIME_ROOT": str(tmp_path / "ort"), "NLOHMANN_JSON_ROOT": json_at(tmp_path / "json")}
    command = ["cmake", "--preset", preset, "-B", str(tmp_path / "out")]
    source = SCRIPT.parents[1] / "plugins" / "runtime"
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env={**os.environ, **roots})
    assert done.returncode == 0, done.stderr
    cache = (tmp_path / "out" / "CMakeCache.txt").read_text(encoding="utf-8")
    for line in (
        f"SEMKV_SANITIZE:STRING={sanitizers}",
        f"SEMKV_DRIVER:BOOL={'ON' if sanitizers else 'OFF'}",
        f"SEMKV_JSON_INCLUDE:PATH={tmp_path / 'json' / 'include'}",
        *([] if sanitizers else ["CMAKE_BUILD_TYPE:STRING=Release"]),
    ):
        assert line in cache.splitlines()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_a_preset_without_headers_says_so(tmp_path: Path):
    command = ["cmake", "--preset", "release", "-B", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "ONNXRUNTIME_ROOT"}
    source = SCRIPT.parents[1] / "plugins" / "runtime"
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "No ONNX Runtime headers: expected onnxruntime_c_api.h" in said
    assert "Run scripts/build_runtime.sh, or set ONNXRUNTIME_ROOT" in said

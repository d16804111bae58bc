"""scripts/build_plugins.sh: what it finds where, and that a build folder's earlier settings do not survive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "build_plugins.sh"
TOOLS = ["bash", "cat", "dirname", "grep", "ls", "mkdir", "mktemp", "rm", "sed", "sort", "tail", "tee", "uname"]


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with the shell's tools and this Python only: no nvcc, no toolkit, no HOME."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (folder / tool).symlink_to(found)
    (tmp_path / "toolkits").mkdir()
    (tmp_path / "packages").mkdir()
    return {
        "PATH": str(folder),
        "CUDA_TOOLKITS": str(tmp_path / "toolkits"),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path / "packages"),
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_nvcc_is_found_in_this_order(bare: dict[str, str], tmp_path: Path) -> None:
    wheel = executable(tmp_path / "packages/nvidia/cu13/bin/nvcc")
    found = [run(bare, "--print-nvcc").stdout.strip()]
    expected = [wheel]
    for name in ("cuda-9.2", "cuda-13.0", "cuda-12.6", "cuda"):
        executable(tmp_path / "toolkits" / name / "bin" / "nvcc")
        found.append(run(bare, "--print-nvcc").stdout.strip())
        expected.append(tmp_path / "toolkits" / (name if name != "cuda-12.6" else "cuda-13.0") / "bin" / "nvcc")
    expected.append(executable(tmp_path / "bin/nvcc"))
    found.append(run(bare, "--print-nvcc").stdout.strip())
    assert found == [str(path) for path in expected]
    assert run({**bare, "CUDACXX": "/my/nvcc"}, "--print-nvcc").stdout == "/my/nvcc\n"


def test_without_nvcc_it_says_where_it_looked(bare: dict[str, str], tmp_path: Path) -> None:
    # Without site-packages, where the wheels of nvcc are.
    bare["PYTHON"] = str(executable(tmp_path / "bin/python-alone", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'))
    done = run(bare, "--kernels-only")
    assert done.returncode != 0
    assert "no nvcc: expected it in CUDACXX, on PATH, under" in done.stderr and "nvidia-cuda-cccl" in done.stderr


@pytest.mark.skipif(Path("/usr/include/NvInferRuntime.h").exists(), reason="the system has TensorRT headers")
def test_headers_of_an_installed_wheel_need_no_network(bare: dict[str, str], tmp_path: Path) -> None:
    headers = tmp_path / "packages/kernel_lens/include/tensorrt"
    headers.mkdir(parents=True)
    (headers / "NvInferRuntime.h").touch()
    assert run(bare, "--print-headers").stdout == f"{headers}\n"
    sdk = tmp_path / "sdk"
    done = run({**bare, "TENSORRT_ROOT": str(sdk)}, "--print-headers")
    assert done.returncode != 0 and "TENSORRT_ROOT has no include/NvInferRuntime.h" in done.stderr
    (sdk / "include").mkdir(parents=True)
    (sdk / "include" / "NvInferRuntime.h").touch()
    assert run({**bare, "TENSORRT_ROOT": str(sdk)}, "--print-headers").stdout == f"{sdk}/include\n"


@pytest.mark.skipif(Path("/usr/include/NvInferRuntime.h").exists(), reason="the system has TensorRT headers")
def test_without_headers_and_home_it_says_what_to_do(bare: dict[str, str], tmp_path: Path) -> None:
    python = executable(tmp_path / "python", "#!/bin/sh\nexit 1\n")
    done = run({**bare, "PYTHON": str(python), "TMPDIR": str(tmp_path)}, "--print-headers")
    assert done.returncode != 0
    assert "no TensorRT headers: set TENSORRT_ROOT" in done.stderr and "unbound" not in done.stderr


@pytest.mark.parametrize("option", ["--arch", "--out", "--target", "--jobs"])
def test_an_option_without_its_value(bare: dict[str, str], option: str) -> None:
    done = run(bare, option)
    assert done.returncode == 2
    assert f"option {option}: expected a value, got none" in done.stderr and "unbound" not in done.stderr


def test_every_setting_is_given_every_time(bare: dict[str, str], tmp_path: Path) -> None:
    """A cmake that writes down what it is told, and does not remember."""
    executable(tmp_path / "bin/cmake", f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    nvcc = executable(tmp_path / "bin/nvcc")
    out = tmp_path / "out"

    def told(*arguments: str) -> list[str]:
        (tmp_path / "calls").unlink(missing_ok=True)
        done = run(bare, "--kernels-only", "--out", str(out), *arguments)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text().splitlines()[0].split()

    assert {"-DSEMKV_EMULATED=1", "-DSEMKV_SANITIZE=1"} <= set(told("--emulated", "--sanitize"))
    assert {"-DSEMKV_EMULATED=1", "-DSEMKV_SANITIZE=0"} <= set(told("--emulated"))
    settings = {"-DSEMKV_EMULATED=0", "-DSEMKV_SANITIZE=0", "-DSEMKV_PLUGINS=OFF", f"-DCMAKE_CUDA_COMPILER={nvcc}"}
    assert settings | {"-DCMAKE_CUDA_ARCHITECTURES=80;90"} <= set(told("--arch", "80;90"))
    assert settings | {"-UCMAKE_CUDA_ARCHITECTURES"} <= set(told())
    # With another compiler CMake would start over, and forget the options.
    (out / "CMakeCache.txt").write_text(f"CMAKE_CUDA_COMPILER:FILEPATH={nvcc}\n")
    told()
    assert (out / "CMakeCache.txt").exists()
    bare["CUDACXX"] = str(executable(tmp_path / "other/nvcc"))
    told()
    assert not (out / "CMakeCache.txt").exists()


def test_a_folder_made_with_sanitizers_is_built_without(tmp_path: Path) -> None:
    for options, setting in (["--sanitize"], "1"), ([], "0"):
        command = [str(SCRIPT), "--emulated", "--kernels-only", "--out", str(tmp_path / "out"), "--target", "help"]
        subprocess.run([*command, *options], check=True, capture_output=True)
        assert f"SEMKV_SANITIZE:BOOL={setting}\n" in (tmp_path / "out" / "CMakeCache.txt").read_text()


def test_the_toolkit_of_the_wheels_compiles_a_kernel(bare: dict[str, str], tmp_path: Path) -> None:
    if "/nvidia/cu" not in run(bare, "--print-nvcc").stdout:
        pytest.skip("no nvcc among this Python's packages (PyPI: nvidia-cuda-nvcc, nvidia-cuda-cccl)")
    tools = {tool: path for tool in ("cmake", "ninja", "g++", "cc", "ar") if (path := shutil.which(tool))}
    for tool, path in tools.items():
        (tmp_path / "bin" / tool).symlink_to(path)
    environment = {**os.environ, **bare, "PATH": f"{bare['PATH']}:/usr/bin:/bin"}
    target = "CMakeFiles/semkv_objects.dir/compact_cache/compact_cache.cu.o"
    done = run(environment, "--kernels-only", "--arch", "80", "--out", str(tmp_path / "out"), "--target", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / target).exists()

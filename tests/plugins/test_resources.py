"""What nvcc makes of the kernels: registers and spills, the width of loads, the libraries' symbols and dependencies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ATTENTION = "decodeKernel|tensorKernel"
DECODE_KERNELS = 5 * (4 + 2 * 2 + 2 * 2)
"""Head sizes; row tiles of float32, of two 16-bit types, of two types of codes."""
TENSOR_KERNELS = 5 * 2 * 3
"""Head sizes, 16-bit types, caches of that type or of two types of codes."""


def find_cuobjdump() -> str | None:
    folders = [Path(p) / "nvidia" / "cu13" / "bin" for p in sys.path]
    folders += sorted(Path("/usr/local").glob("cuda*/bin"))
    found = shutil.which("cuobjdump") or next(
        (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists()), None
    )
    return found


def ptxas_report(build: Path) -> dict[tuple[str, str], str]:
    """(kernel, architecture) to the last report of it in build.log."""
    pattern = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'\n(.*\n.*\n.*)\n")
    return {(m[1], m[2]): m[3] for m in pattern.finditer((build / "build.log").read_text())}


def test_attention_kernels_do_not_spill(cuda_build: Path) -> None:
    report = {key: text for key, text in ptxas_report(cuda_build).items() if re.search(ATTENTION, key[0])}
    assert len(report) == 2 * (DECODE_KERNELS + TENSOR_KERNELS)
    spilling = {
        key: text for key, text in report.items() if not re.search(r"\b0 bytes stack frame, 0 bytes spill", text)
    }
    assert not spilling, spilling
    assert all(re.search(r"Used \d+ registers", text) for text in report.values())


def test_block_kernels_do_not_spill(cuda_build: Path) -> None:
    names = r"blockMapKernel|blockScoreKernel|blockSelectKernel"
    report = {key: text for key, text in ptxas_report(cuda_build).items() if re.search(names, key[0])}
    # Map: 3 element types, mean or bounds; scores: 3 element types; the choice: one. 2 architectures.
    assert len(report) == 2 * (6 + 3 + 1)
    spilling = [key for key, text in report.items() if "0 bytes stack frame, 0 bytes spill" not in text]
    assert not spilling, spilling


def test_compaction_kernels_do_not_spill(cuda_build: Path) -> None:
    names = r"7cluster|7compact|moveRowsKernel|unstageKernel"
    report = {key: text for key, text in ptxas_report(cuda_build).items() if re.search(names, key[0])}
    # Of 3 element types: norms, cosines, moving and bringing back rows. Seeds, places, weights; plan, lengths, biases.
    assert len(report) == 2 * (3 * 4 + 3 + 3)
    spilling = [key for key, text in report.items() if "0 bytes stack frame, 0 bytes spill" not in text]
    assert not spilling, spilling


def test_attention_kernels_load_whole_pieces(cuda_build: Path) -> None:
    """16 bytes a load (8 over codes of head sizes that 16 do not divide evenly), from global memory, none to the stack;
    tensor cores where they are meant to be."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)")
    sass = subprocess.run(
        [cuobjdump, "--dump-sass", "-arch", "sm_90", str(cuda_build / "libsemkv_kernels.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    decode = tensor = 0
    for function in sass.split("Function : ")[1:]:
        name = function.split("\n", 1)[0]
        if not re.search(ATTENTION, name):
            continue
        # A generic load is one whose address space the compiler lost.
        assert not re.search(r"\b(LDL|STL|LD\.E)\b", function), name
        wide = function.count("LDG.E.128")
        if "tensorKernel" in name:
            tensor += 1
            assert function.count("HMMA.16816.F32") >= 16, name
            # Keys and values, once by one address and once slot by slot.
            codes = re.search(r"4Int8|3Fp8", name)
            assert (wide + function.count("LDG.E.64") if codes else wide) >= 16, name
        elif re.search(r"(__half|__nv_bfloat16)Li\d+ELi4E", name):
            decode += 1
            assert wide == 0 and len(function) < 5000, name  # tensor cores take these calls
        else:
            decode += 1
            assert wide >= 8 and "HMMA" not in function, name
    assert (decode, tensor) == (DECODE_KERNELS, TENSOR_KERNELS)


def test_plugin_library_exports_two_symbols_and_links_no_tensorrt(cuda_build: Path) -> None:
    library = str(cuda_build / "libsemkv_plugins.so")
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[-1] for line in symbols.splitlines()) == ["getCreators", "setLoggerFinder"]
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.search("nvinfer|tensorrt|libcudart|libstdc|libgcc", needed), needed

"""plugins/common/runtime_abi.h with two TensorRTs in one process, as libraries of a few lines each."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TENSORRT = """
#include <cstdint>
extern "C" __attribute__((visibility("default"))) int32_t getInferLibMajorVersion() { return MAJOR; }
namespace { struct Finder { virtual void* find() { return nullptr; } }; }
extern "C" __attribute__((visibility("default"))) void* finder() { static Finder instance; return &instance; }
"""

PROGRAM = """
#include "plugins/common/runtime_abi.h"
#include <cstdio>
struct Own { virtual void f() {} };
int main(int, char** libraries)
{
    for (int i = 1; i < 3; ++i)
    {
        void* const handle = dlopen(libraries[i], RTLD_LAZY | (i == 1 ? RTLD_GLOBAL : RTLD_LOCAL));
        void* const finder = reinterpret_cast<void* (*)()>(dlsym(handle, "finder"))();
        std::printf("%d ", semkv::majorOf(finder, 0));
    }
    Own own;
    std::printf("%d\\n", semkv::majorOf(&own, 0));
}
"""


def test_an_object_belongs_to_the_tensorrt_that_has_its_table(tmp_path: Path) -> None:
    """The second library is loaded privately, as Python does; an object of no TensorRT goes by the one found first."""
    (tmp_path / "library.cpp").write_text(TENSORRT)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    for major in (10, 11):
        command = ["g++", "-shared", "-fPIC", f"-DMAJOR={major}", "library.cpp", "-o", f"trt{major}.so"]
        subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run(["g++", "-std=c++17", f"-I{ROOT}", "program.cpp", "-o", "program", "-ldl"], cwd=tmp_path, check=True)
    done = subprocess.run(["./program", "./trt10.so", "./trt11.so"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["10", "11", "10"], done.stderr

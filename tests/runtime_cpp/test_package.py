"""What is installed: one library with the C interface and nothing else, and a header that C takes."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path


def test_exports_what_the_header_declares(installed: Path):
    header = (installed / "include" / "semkv" / "semkv.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^SEMKV_API [^;]*?\b(semkv_\w+)\(", header, re.M))
    command = ["nm", "-D", "--defined-only", str(installed / "lib" / "libsemkv.so")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[-1] for line in lines} == declared and len(declared) == 27


def test_links_nothing_of_onnxruntime(installed: Path):
    command = ["ldd", str(installed / "lib" / "libsemkv.so")]
    needed = re.findall(r"^\s*(\S+?)[.\s]", subprocess.run(command, capture_output=True, text=True).stdout, re.M)
    assert {Path(name).name for name in needed} <= {
        "linux-vdso",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "ld-linux-x86-64",
    }


def test_the_header_is_c(installed: Path, tmp_path: Path):
    source = tmp_path / "c.c"
    source.write_text(
        "#include <semkv/semkv.h>\n#include <stdio.h>\nint main(void) {\n"
        '  semkv_bundle* bundle = 0;\n  semkv_error* error = semkv_bundle_open("/nowhere", 0, &bundle);\n'
        '  printf("%u %d %s\\n", semkv_api_version(), semkv_error_code(error), semkv_error_message(error));\n'
        "  semkv_error_free(error);\n  return 0;\n}\n"
    )
    program = tmp_path / "c"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{installed}/include"]
    links = [f"-L{installed}/lib", f"-Wl,-rpath,{installed}/lib", "-lsemkv"]
    subprocess.run(["cc", *flags, str(source), "-o", str(program), *links], check=True)
    out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert out.startswith("1 2 /nowhere: no such bundle (expected a directory")


class Options(ctypes.Structure):
    """semkv_bundle_options of a header with a field more."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("pointers", ctypes.c_void_p * 4),
        ("verify_all", ctypes.c_int32),
        ("libraries", ctypes.c_void_p * 2),
        ("allow_plugins", ctypes.c_int32),
        ("newer", ctypes.c_int64),
    )


def test_structs_of_other_versions(installed: Path, tmp_path: Path):
    """A smaller one has defaults for the rest, a larger one must not say anything that is not known; null is said."""
    library = ctypes.CDLL(str(installed / "lib" / "libsemkv.so"))
    for name, result in (("semkv_bundle_open", ctypes.c_void_p), ("semkv_error_message", ctypes.c_char_p)):
        getattr(library, name).restype = result
    library.semkv_error_message.argtypes = library.semkv_error_free.argtypes = [ctypes.c_void_p]
    opened = ctypes.c_void_p()

    def message(options: Options | None, path: bytes | None = b"/nowhere") -> str:
        given = None if options is None else ctypes.byref(options)
        error = library.semkv_bundle_open(path, given, ctypes.byref(opened))
        assert error
        text = library.semkv_error_message(error).decode()
        library.semkv_error_free(error)
        return str(text)

    size = ctypes.sizeof(Options)
    first = Options.libraries.offset  # the end of the struct in 1.0's first header, which has no TensorRT
    for fine in (None, Options(size=8), Options(size=first, newer=1), Options(size=size)):
        assert message(fine).startswith("/nowhere: no such bundle")
    expected = "options: a wrong argument (expected fields that this version knows, got one of a newer semkv.h"
    assert message(Options(size=size, newer=1)).startswith(expected)
    assert message(Options()) == "options.size: a wrong argument (expected sizeof the struct, got 0)."
    assert message(None, None) == "path: a wrong argument (expected a pointer, got null)."

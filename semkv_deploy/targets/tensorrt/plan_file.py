"""The header of a TensorRT plan: which runtime wrote it and in which version, read without the runtime.

The first 28 bytes are as trtexec reads them (`--getPlanVersionOnly`): a tag, then at byte 24 the version in four bytes.
TensorRT-RTX 1.7 has another tag and, at byte 16, the number of bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.tensorrt.api import TITLES, Runtime, installed_version

HEADER_BYTES = 28
_TAGS: dict[bytes, Runtime] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
_PACKAGES: dict[Runtime, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
}


def read_header(plan: Path) -> tuple[Runtime, str]:
    """Runtime and version, e.g. "1.7.1.116", that wrote a plan.

    Raises:
        SemkvError: when the file is missing, no plan, or truncated.
    """
    rebuild = "build the bundle again, or copy it again from where it was built"
    if not plan.is_file():
        raise SemkvError("no such engine", where=plan, fix=rebuild)
    with plan.open("rb") as file:
        header = file.read(HEADER_BYTES)
    runtime = _TAGS.get(header[:4])
    if runtime is None or len(header) < HEADER_BYTES:
        raise SemkvError("not a TensorRT plan", where=plan, fix=rebuild)
    (size,) = struct.unpack_from("<Q", header, 16)
    if runtime == "tensorrt-rtx" and size != plan.stat().st_size:
        raise SemkvError(
            "the engine is truncated or altered",
            where=plan,
            expected=f"{size} bytes",
            got=f"{plan.stat().st_size} bytes",
            fix=rebuild,
        )
    return runtime, ".".join(map(str, header[24:28]))


def check_plan(plan: Path, runtime: Runtime) -> None:
    """Fails unless the installed runtime can read a plan: engines of another version, or runtime, are refused by it.

    Raises:
        SemkvError: as `read_header` and `check_plan_version`, or when another runtime wrote it.
    """
    writer, version = read_header(plan)
    if writer != runtime:
        raise SemkvError(
            "the engine was built by another runtime",
            where=plan,
            expected=TITLES[runtime],
            got=f"{TITLES[writer]} {version}",
            fix=f"use --target {writer}",
        )
    check_plan_version(version, runtime, where=plan)


def check_plan_version(recorded: str, runtime: Runtime, *, where: object = None) -> None:
    """Fails unless the installed runtime is the version that built an engine.

    Args:
        recorded: version that built it, from the manifest or the plan's header.
        where: the engine, for the message.

    Raises:
        SemkvError: saying which version to install.
    """
    installed = installed_version(runtime)
    # A plan has four numbers, and so has TensorRT's own version; a wheel may be a post-release of it.
    if installed is not None and installed.split(".")[:4] == recorded.split(".")[:4]:
        return
    packages = " ".join(f"{package}=={recorded}" for package in _PACKAGES[runtime])
    raise SemkvError(
        f"the engine needs the version of {TITLES[runtime]} that built it",
        where=where,
        expected=recorded,
        got=installed or "none installed",
        fix=f"install that version: pip install {packages}, or build the engine again with the installed one",
    )

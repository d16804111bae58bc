"""What differs between the two runtimes, and what is said of machines without them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets import TARGETS, TO_RUN, require_available
from semkv_deploy.targets.tensorrt import api as tensorrt_api
from semkv_deploy.targets.tensorrt import plan_file
from semkv_deploy.targets.tensorrt.api import (
    Gpu,
    Runtime,
    library_environment,
    missing,
    missing_to_run,
    parse_compute_capabilities,
    rtx_library_folder,
)
from semkv_deploy.targets.tensorrt.plan_file import check_plan, check_plan_version, read_header


def machine(monkeypatch: pytest.MonkeyPatch, *, modules: tuple[str, ...] = (), gpu: Gpu | None = None) -> None:
    """A machine with these Python modules and this GPU."""
    present = {name: object() for name in modules}
    monkeypatch.setattr(tensorrt_api.importlib.util, "find_spec", present.get)
    monkeypatch.setattr(tensorrt_api, "find_gpu", lambda: (gpu, None if gpu else "there is no NVIDIA driver here"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("86,89,120", [86, 89, 120]),
        ("8.6", [86]),
        ("sm_86", [86]),
        ("SM120, sm89,compute_86, 8.6", [86, 89, 120]),
        ("12.0", [120]),
        (None, [80, 86, 89, 120]),
    ],
)
def test_compute_capabilities(text: str | None, expected: list[int]) -> None:
    assert parse_compute_capabilities(text, "tensorrt-rtx") == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("90", ["no Hopper GPU", "75 or 80 or 86 or 89 or 120 or 121", "got 90", "target tensorrt"]),
        ("86,10.0", ["no data centre Blackwell GPU", "got 100"]),
        ("87", ["no such GPU", "got 87"]),
        ("ampere", ["not a compute capability", "86 or 8.6 or sm_86", "got ampere"]),
        ("86,,89", ["not a compute capability", "got nothing"]),
        ("8", ["not a compute capability"]),
        ("8.66", ["not a compute capability"]),
    ],
)
def test_bad_compute_capabilities(text: str, words: list[str]) -> None:
    with pytest.raises(SemkvError, match="--compute-capability") as caught:
        parse_compute_capabilities(text, "tensorrt-rtx")
    for word in words:
        assert word in str(caught.value)


def test_tensorrt_builds_for_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=Gpu("NVIDIA L4", 89))
    assert parse_compute_capabilities(None, "tensorrt") == [89]
    assert parse_compute_capabilities("8.9", "tensorrt") == [89]
    with pytest.raises(SemkvError, match=r"GPU in the machine only .*89 \(NVIDIA L4\), got 86, 120"):
        parse_compute_capabilities("86,89,120", "tensorrt")


def test_what_a_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert missing("tensorrt-rtx") == missing_to_run("tensorrt-rtx")
    assert "pip install 'semkv-deploy[rtx]'" in str(missing("tensorrt-rtx"))
    assert "pip install 'semkv-deploy[gpu]'" in str(missing("tensorrt"))
    machine(monkeypatch, modules=("tensorrt", "tensorrt_rtx"))
    assert missing("tensorrt-rtx") is None
    assert "no NVIDIA driver" in str(missing_to_run("tensorrt-rtx"))
    assert "no NVIDIA driver" in str(missing("tensorrt")) and "tensorrt-rtx" in str(missing("tensorrt"))
    machine(monkeypatch, modules=("tensorrt", "tensorrt_rtx_bindings"), gpu=Gpu("NVIDIA H200", 90))
    assert missing("tensorrt") is None and missing_to_run("tensorrt") is None and missing("tensorrt-rtx") is None
    assert "does not know the NVIDIA H200" in str(missing_to_run("tensorrt-rtx"))
    machine(monkeypatch, modules=("tensorrt_rtx_bindings",), gpu=Gpu("NVIDIA RTX 4090", 89))
    assert missing_to_run("tensorrt-rtx") is None


def test_targets_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    for target in ("tensorrt", "tensorrt-rtx"):
        assert TARGETS[target]() and TO_RUN[target]()
        with pytest.raises(SemkvError, match=f"--target {target}: not available on this machine. Install"):
            require_available(target)
    machine(monkeypatch, modules=("tensorrt_rtx",))
    require_available("tensorrt-rtx")


def test_library_name_is_given_to_children_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/given")
    before = dict(os.environ)
    with library_environment("tensorrt") as environment:
        assert environment == before
    folder = rtx_library_folder()
    if folder is None:
        pytest.skip("no TensorRT-RTX wheel that lacks the unversioned library")
    with library_environment("tensorrt-rtx") as environment:
        shim, given = environment["LD_LIBRARY_PATH"].split(os.pathsep)
        assert given == "/given"
        assert (Path(shim) / "libtensorrt_rtx.so").resolve() == (folder / "libtensorrt_rtx.so.1").resolve()
    assert not Path(shim).exists() and dict(os.environ) == before


def plan(path: Path, tag: bytes = b"vtrt", version: tuple[int, ...] = (1, 7, 1, 116), size: int = 64) -> Path:
    """A plan's header as both runtimes write it, and zeros."""
    path.write_bytes((tag + struct.pack("<IQQ4B", 0, 2, size, *version)).ljust(64, b"\0"))
    return path


def test_header_of_a_plan(tmp_path: Path) -> None:
    assert read_header(plan(tmp_path / "a")) == ("tensorrt-rtx", "1.7.1.116")
    assert read_header(plan(tmp_path / "b", b"ftrt", (10, 16, 1, 11))) == ("tensorrt", "10.16.1.11")


@pytest.mark.parametrize(
    "installed, got", [("1.6.0.60", "got 1.6.0.60"), (None, "got none installed"), ("1.7.1.117", "got 1.7.1.117")]
)
def test_engine_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, got: str
) -> None:
    monkeypatch.setattr(plan_file, "installed_version", lambda runtime: installed)
    with pytest.raises(SemkvError) as caught:
        check_plan(plan(tmp_path / "decoder.plan"), "tensorrt-rtx")
    for word in ["decoder.plan", "expected 1.7.1.116", got, "tensorrt-rtx-cu13-bindings==1.7.1.116"]:
        assert word in str(caught.value)


def test_engine_of_this_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "installed_version", lambda runtime: "1.7.1.116")
    check_plan(plan(tmp_path / "a"), "tensorrt-rtx")
    check_plan_version("1.7.1.116", "tensorrt-rtx")
    with pytest.raises(SemkvError, match=r"pip install tensorrt==10\.3\.0\.26"):
        check_plan_version("10.3.0.26", "tensorrt")


def test_engine_of_a_post_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's version has four numbers; the wheel's may have more words."""
    monkeypatch.setattr(plan_file, "installed_version", lambda runtime: "10.13.3.9.post1")
    check_plan_version("10.13.3.9", "tensorrt")
    with pytest.raises(SemkvError, match=r"got 10\.13\.3\.9\.post1"):
        check_plan_version("10.13.3.8", "tensorrt")


@pytest.mark.parametrize("runtime, tag", [("tensorrt", b"vtrt"), ("tensorrt-rtx", b"ftrt")])
def test_engine_of_the_other_runtime(tmp_path: Path, runtime: Runtime, tag: bytes) -> None:
    with pytest.raises(SemkvError, match="built by another runtime"):
        check_plan(plan(tmp_path / "a", tag), runtime)


@pytest.mark.parametrize("content", [b"", b"vtrt", b"PK\x03\x04" + bytes(60), bytes(64)])
def test_no_plan(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(SemkvError, match="not a TensorRT plan"):
        check_plan(tmp_path / "a", "tensorrt-rtx")


def test_truncated_or_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(SemkvError, match=r"truncated or altered .*expected 65 bytes, got 64 bytes"):
        check_plan(plan(tmp_path / "a", size=65), "tensorrt-rtx")
    with pytest.raises(SemkvError, match="no such engine"):
        check_plan(tmp_path / "b", "tensorrt-rtx")

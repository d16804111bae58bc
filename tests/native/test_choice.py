"""`--native` and `--cache-dtype`: what they come to, and the sentences where they cannot be had."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.onnxruntime import native


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libsemkv_onnxruntime.so")


def compiled(path: Path, source: str) -> Path:
    subprocess.run(["c++", "-shared", "-fPIC", "-x", "c", "-o", str(path), "-"], input=source, text=True, check=True)
    return path


def sentence(native_option: str, cache_dtype: str) -> str:
    with pytest.raises(SemkvError) as caught:
        native.choose_native(native_option, cache_dtype)  # type: ignore[arg-type]
    return str(caught.value)


def test_auto_takes_the_library_that_is_there(native_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", native_library)
    choice = native.choose_native("auto", "float16")
    assert choice.on and choice.cache_dtype == "float16"
    assert choice.why.startswith("libsemkv_onnxruntime.so 2 is here (")
    assert native.choose_native("off", "float32").on is False


@pytest.mark.usefixtures("no_library")
def test_auto_without_the_library_says_so() -> None:
    choice = native.choose_native("auto", "float32")
    assert not choice.on
    assert choice.why == "no libsemkv_onnxruntime.so: build it with scripts/build_native.sh"


@pytest.mark.usefixtures("no_library")
def test_on_without_the_library_is_an_error() -> None:
    message = sentence("on", "float32")
    assert "--native on: native operators are not available" in message
    assert "build it with scripts/build_native.sh" in message.lower()


@pytest.mark.usefixtures("no_library")
def test_narrow_caches_without_the_library_are_an_error() -> None:
    message = sentence("auto", "int8")
    assert "--cache-dtype int8: only native operators take such caches" in message
    assert "no libsemkv_onnxruntime.so" in message


def test_narrow_caches_with_native_off_are_an_error(native_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", native_library)
    assert "use --native auto" in sentence("off", "float16").lower()


def test_a_library_of_a_version_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = "int semkv_onnxruntime_version(void) { return 1; }"
    monkeypatch.setattr(native, "LIBRARY", compiled(tmp_path / "libsemkv_onnxruntime.so", source))
    assert (
        native.missing() == "libsemkv_onnxruntime.so is of version 1, before 2: build it with scripts/build_native.sh"
    )


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libsemkv_onnxruntime.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", path)
    assert "libsemkv_onnxruntime.so does not load" in str(native.missing())
    monkeypatch.setattr(native, "LIBRARY", compiled(tmp_path / "other.so", "int nothing;"))
    assert "does not load" in str(native.missing())

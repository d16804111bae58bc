"""Plugins that were asked for are in the engines, or there is no bundle; the manifest has those that are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.bundle import TensorRTRecord
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Full, SemantiCache, StreamingLLM
from semkv_deploy.targets.tensorrt import plugins as plugin_choice
from semkv_deploy.targets.tensorrt.api import missing
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from semkv_deploy.targets.tensorrt.plugins import OPERATORS, choose_plugins

RTX = pytest.mark.skipif(missing("tensorrt-rtx") is not None, reason="TensorRT-RTX is not installed")
CREATORS = {name: f"semkv::{name} 1" for name in OPERATORS}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A file; what a TensorRT would say of it is up to the test (`registering`)."""
    path = tmp_path / "lib.so"
    path.touch()
    return path


@pytest.fixture
def registering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`registering(*operators)`: the library has the creators of these; `registering(None)`: there is no TensorRT."""

    def give(*names: str | None) -> None:
        found = None if names == (None,) else [CREATORS.get(str(name), str(name)) for name in names]
        monkeypatch.setattr(plugin_choice, "_registered", lambda library, target: found)

    return give


def build(export: Path, tmp_path: Path, asked: str, library: Path, method: Any, budgets: Any) -> TensorRTRecord:
    options = TensorRTOptions(engines=False, plugins=tuple(asked.split(",")), plugin_library=library)
    bundle = build_bundle(
        str(export / "decoder.onnx"),
        tmp_path / "bundle",
        budgets=budgets,
        method=method,
        target="tensorrt-rtx",
        tensorrt=options,
    )
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    folder = tmp_path / "bundle" / "targets" / "tensorrt-rtx"
    assert (folder / library.name).exists() == bool(record.plugins) == (record.plugin_library is not None)
    return record


def test_asked_for_and_in_no_engine(tiny_export: Path, tmp_path: Path, library: Path, registering: Any):
    """StreamingLLM's compressor has no clustering."""
    registering(*OPERATORS)
    with pytest.raises(SemkvError) as error:
        build(tiny_export, tmp_path, "semantic_cluster", library, StreamingLLM(), [0.5])
    assert str(error.value) == (
        "--plugins: SemanticCluster was asked for as a plugin and is in no engine of budget 0.5 (expected operators "
        "that the method's graphs have, got no plugin in any engine). Leave it out of --plugins, or choose a --method "
        "that has it."
    )
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(SemkvError, match=r"SemanticCluster was .* of budget 0.5 .*got CompactCache, NexusAttention"):
        asked = "nexus_attention,compact_cache,semantic_cluster"
        build(tiny_export, tmp_path, asked, library, StreamingLLM(), [0.5])


def test_a_full_cache_needs_no_plugin_of_the_compressor(
    tiny_export: Path, tmp_path: Path, library: Path, registering: Any
):
    registering(*OPERATORS)
    with pytest.raises(SemkvError, match=r"CompactCache was .* in no engine of budget 1"):
        build(tiny_export, tmp_path, "compact_cache", library, SemantiCache(), [1.0])
    with pytest.raises(SemkvError, match=r"CompactCache was .* in no engine of budget 0.5"):
        build(tiny_export, tmp_path, "nexus_attention,compact_cache", library, Full(), [0.5])
    record = build(tiny_export, tmp_path, "compact_cache", library, SemantiCache(), [0.5, 1.0])
    assert record.plugins == ["CompactCache"]


def test_manifest_has_what_is_in_engines(tiny_export: Path, tmp_path: Path, library: Path, registering: Any):
    """`auto` takes what the library registers, and records what of it the method's graphs have."""
    registering("SemanticCluster", "CompactCache", "semkv::SemanticBlockMap 1")
    record = build(tiny_export, tmp_path, "auto", library, StreamingLLM(), [0.5])
    assert record.plugins == ["CompactCache"]
    decoder, compressor = record.budgets[0].engines
    assert "PLUGIN_V3" not in decoder.layers and compressor.layers == {"PLUGIN_V3": 1}


def test_auto_that_finds_nothing_to_use_keeps_no_library(
    tiny_export: Path, tmp_path: Path, library: Path, registering: Any
):
    registering("SemanticCluster")
    assert build(tiny_export, tmp_path, "auto", library, StreamingLLM(), [0.5]).plugins == []


def refused(asked: str, library: Path | None) -> str:
    with pytest.raises(SemkvError) as error:
        choose_plugins(tuple(asked.split(",")), library, "tensorrt-rtx")
    return str(error.value)


def test_auto_without_a_library_is_no_silent_none():
    assert refused("auto", None) == (
        "--plugins auto: plugins were asked for without their library (expected --plugin-library "
        "libsemkv_plugins.so). Build it with scripts/build_plugins.sh, or use --plugins none."
    )


def test_library_without_the_plugins(library: Path, registering: Any):
    registering("NexusAttention")
    text = refused("nexus_attention,compact_cache", library)
    assert (
        "the plugin library has no CompactCache (expected semkv::CompactCache 1, got semkv::NexusAttention 1)" in text
    )
    registering()
    assert f"has no {' or '.join(OPERATORS)}" in refused("auto", library)
    registering(None)
    assert "no TensorRT is installed here that could say" in refused("auto", library)
    named = choose_plugins(("nexus_attention",), library, "tensorrt-rtx")
    assert named == ({"NexusAttention"}, True), "a bundle of graphs can be made without any TensorRT"


@RTX
def test_a_real_library_is_asked(plugin_library: Path, library: Path):
    """The tests' own library registers semkv::Append only; an empty file is none."""
    assert "got semkv::Append 1" in refused("auto", plugin_library)
    assert "has no CompactCache" in refused("compact_cache", plugin_library)
    assert "TensorRT does not load the plugin library" in refused("compact_cache", library)

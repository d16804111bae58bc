"""Names of what is measured, and what is refused before anything is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.bench import subjects
from semkv_deploy.bench.engines import base
from semkv_deploy.bench.subjects import subjects_of_bundles
from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError

from .conftest import needs_genai, needs_llama_cpp


def peers(vocabulary: int = 1, llama_caches: tuple[str, ...] = ("f16",), **paths: Any) -> list[subjects.Subject]:
    given = {"genai_model": None, "gguf": None, "llama_server": None, "transformers_source": None, **paths}
    return subjects.peers(llama_caches=llama_caches, vocabulary=vocabulary, **given)


def test_one_bundle_is_named_by_its_budgets_and_several_by_what_tells_them_apart(tiny_bundle: Path, tmp_path: Path):
    def names(*roots: Path) -> list[str]:
        opened = [Bundle.open(root, only=["bundle.json"]) for root in roots]
        return [each.name for each in subjects_of_bundles(opened, [0.25], "onnxruntime-cpu", allow_plugins=False)]

    assert names(tiny_bundle) == ["budget 0.25"]
    copies = [tmp_path / "a" / "bundle", tmp_path / "b" / "bundle", tmp_path / "other"]
    for copy in copies:
        shutil.copytree(tiny_bundle, copy, copy_function=shutil.copy)
    assert names(copies[0], copies[2]) == ["bundle, budget 0.25", "other, budget 0.25"]
    assert names(*copies[:2]) == ["a/bundle, budget 0.25", "b/bundle, budget 0.25"]


def test_budgets_come_largest_first_with_their_cache_type(tiny_bundle: Path):
    found = subjects_of_bundles([Bundle.open(tiny_bundle)], [], "onnxruntime-cpu", allow_plugins=False)
    assert [(each.budget, each.cache, each.is_peer) for each in found] == [
        (1.0, "float32", False), (0.5, "float32", False), (0.25, "float32", False),
    ]  # fmt: skip


@needs_llama_cpp
def test_each_cache_type_of_llama_cpp_is_a_peer(tiny_gguf: Path):
    found = peers(gguf=tiny_gguf, llama_caches=("f16", "f32", "f16"))
    assert [(each.name, each.cache, each.is_peer) for each in found] == [
        ("llama.cpp f16", "f16", True), ("llama.cpp f32", "f32", True),
    ]  # fmt: skip


def test_a_llama_server_stands_in_for_the_package(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    program = tmp_path / "llama-server"
    with pytest.raises(SemkvError, match=r"--llama-server .*: not a program .*llama_server\.sh"):
        peers(gguf=tiny_gguf, llama_server=program)
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    with pytest.raises(SemkvError, match="not a program"):
        peers(gguf=tiny_gguf, llama_server=program)
    program.chmod(0o755)
    assert [each.options["program"] for each in peers(gguf=tiny_gguf, llama_server=program)] == [str(program)]


def test_both_caches_of_transformers_are_peers():
    names = [each.name for each in peers(transformers_source="a/model")]
    assert names == ["transformers DynamicCache", "transformers StaticCache"]


@pytest.mark.parametrize(("option", "module"), [("gguf", "xllamacpp"), ("genai_model", "onnxruntime_genai")])
def test_a_missing_package_is_a_sentence(
    option: str, module: str, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    path = {"gguf": tiny_gguf, "genai_model": tmp_path}[option]
    asked: list[str] = []

    def none_found(name: str) -> None:
        asked.append(name)

    monkeypatch.setattr(base, "find_spec", none_found)
    with pytest.raises(SemkvError, match=r"is not installed\. Install it with: pip install 'semkv-deploy\[bench\]'"):
        peers(**{option: path})
    assert asked == [module]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path):
    wrong = tmp_path / "model.gguf"
    with pytest.raises(SemkvError, match=r"model\.gguf: no such file"):
        peers(gguf=wrong)
    wrong.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(SemkvError, match=r"--llama-cpp .*: not a GGUF file"):
        peers(gguf=wrong)


def test_a_directory_that_is_no_genai_model_is_refused(tmp_path: Path):
    with pytest.raises(
        SemkvError, match=r"not an onnxruntime-genai model\. Make one with: python -m onnxruntime_genai"
    ):
        peers(genai_model=tmp_path)


@needs_genai
def test_a_damaged_genai_configuration_is_named(tmp_path: Path):
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SemkvError, match=r"genai_config\.json: cannot be read"):
        peers(genai_model=tmp_path)


@needs_llama_cpp
def test_a_damaged_gguf_is_named(tiny_gguf: Path, tmp_path: Path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:600])
    with pytest.raises(SemkvError, match=r"--llama-cpp .*cut\.gguf: its metadata cannot be read"):
        peers(gguf=cut)


@needs_llama_cpp
def test_a_model_with_too_few_tokens_is_another_model(tiny_gguf: Path):
    with pytest.raises(
        SemkvError, match=r"another vocabulary than the bundle \(expected 512 entries or more, got 260\)"
    ):
        peers(gguf=tiny_gguf, vocabulary=512)


@needs_llama_cpp
def test_a_quantised_cache_wants_whole_blocks_of_a_head(tiny_gguf: Path):
    with pytest.raises(SemkvError, match=r"a q8_0 cache .*multiple of 32 elements, got 16.*--llama-cpp-cache f16"):
        peers(gguf=tiny_gguf, llama_caches=("f16", "q8_0"))

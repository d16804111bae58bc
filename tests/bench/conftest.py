"""Peers' models, tiny."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_gguf_at, tiny_tokenizer

needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="no xllamacpp")
needs_genai = pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="no onnxruntime-genai")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, 4 heads over 2 KV heads of 16, vocabulary 260."""
    return tiny_gguf_at(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's program where this machine has one, else one that takes the same options."""
    found = shutil.which("llama-server")
    if found:
        return Path(found)
    program = tmp_path_factory.mktemp("llama") / "llama-server"
    script = Path(__file__).with_name("llama_server.py")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


@pytest.fixture(scope="session")
def tiny_genai(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as onnxruntime-genai's builder writes it."""
    from foreign_graphs import by_genai
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    return by_genai(model, tiny_tokenizer(), tmp_path_factory.mktemp("genai") / "model", "fp32").parent


def cell(name: str, budget: float | None, tpot: list[float], **more: Any) -> dict[str, Any]:
    """A cell as `rounds.measure` makes it."""
    from semkv_deploy.bench.statistics import spread

    place = {"context": 1024, "batch": 1, **{key: more.pop(key) for key in ("context", "batch") if key in more}}
    turns = more.pop("turns", [{"seen": 1024, "ttft_s": 2.0, "tpot_ms": tpot[0], "live_slots": 9.0}])
    return {
        "name": name,
        "bundle": "" if budget is None else "b",
        "budget": budget,
        "cache": "float32",
        **place,
        "ttft_s": spread([2.0]),
        "tpot_ms": spread(tpot),
        "tokens_per_s": spread([place["batch"] * 1e3 / ms for ms in tpot]),
        "total_s": 3.0,
        "turns": turns,
        "live_slots": 9.0,
        "cache_mib": 4.0,
        "read_mib": 2.0,
        "process_mib": 50.0,
        **more,
    }

"""Loading checkpoints, and what a user reads when one cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.checkpoint import load_checkpoint
from semkv_deploy.memory.source import read_shape


def test_directory(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    assert checkpoint.name == tiny_checkpoint.name
    assert checkpoint.model.dtype == torch.float32
    assert not checkpoint.model.training
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())
    assert checkpoint.tokenizer.eos_token_id == 1


def test_half_precision_is_widened(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert {parameter.dtype for parameter in load_checkpoint(str(tmp_path)).model.parameters()} == {torch.float32}


def test_gguf(smollm2: Any) -> None:
    """The file is parsed once: a pass over its vocabulary takes seconds."""
    assert smollm2.reads == 1
    model, tokenizer = smollm2.checkpoint.model, smollm2.checkpoint.tokenizer
    assert smollm2.checkpoint.name == smollm2.path.name
    assert (model.config.num_hidden_layers, model.dtype, len(tokenizer)) == (30, torch.float32, 49152)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("source", ["/nowhere/model", "./nothing", "a/b/c", "has space"])
def test_missing_path(source: str) -> None:
    with pytest.raises(SemkvError, match=r"no such checkpoint .*a directory with config\.json"):
        load_checkpoint(source)


def test_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(SemkvError, match=r"model\.gguf: no such file"):
        load_checkpoint(str(tmp_path / "model.gguf"))


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(SemkvError, match=r"is no checkpoint .*config\.json"):
        load_checkpoint(str(tmp_path))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(SemkvError, match=r"has no config\.json .*weights\.gguf.* Name the \.gguf file"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a GGUF file .*got b''"),
        (b"PK\x03\x04 a zip file", "not a GGUF file .*'GGUF', got b'PK"),
        (b"GGUF", "unknown GGUF version"),
        (b"GGUF\x09\x00\x00\x00", "unknown GGUF version .*2 or 3, got 9"),
        (b"GGUF\x03\x00\x00\x00 and then nothing", "the GGUF file is damaged: it ends at byte 25"),
    ],
)
def test_damaged_gguf(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(SemkvError, match=sentence):
        load_checkpoint(str(path))


def test_truncated_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SemkvError, match=r"cannot be loaded .*Check that its files are complete"):
        load_checkpoint(str(tmp_path))


def test_unknown_architecture(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(SemkvError, match=r"cannot be loaded .*no_such_model"):
        load_checkpoint(str(tmp_path))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(SemkvError, match=r"some/model-1: the hub cannot be reached .*hf download some/model-1"):
        load_checkpoint("some/model-1")


def test_cached_model_needs_no_hub(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Out of reach but cached: loaded from the cache alone."""
    import huggingface_hub
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    asked: list[tuple[str, bool]] = []

    def from_cache(loader: Any) -> Any:
        original = loader.from_pretrained

        def load(name: Any, **options: Any) -> Any:
            if name == tiny_checkpoint:  # transformers itself, on the way
                return original(name, **options)
            asked.append((name, options.pop("local_files_only")))
            return original(tiny_checkpoint, **options)

        return load

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    for loader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", from_cache(loader))
    assert load_checkpoint("some/model-1").name == "model-1"
    assert asked == [("some/model-1", True)] * 3


def test_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_: Any, **__: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(SemkvError, match=r"no such checkpoint, here or on the hub .*hf auth login"):
        load_checkpoint("some/model-1")


@pytest.mark.parametrize("read", [load_checkpoint, read_shape])
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**8), ("num_hidden_layers", 0), ("hidden_size", -64), ("vocab_size", 10**11)],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(
    read: Any, name: str, value: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(SemkvError, match=f"{name} is none of a model .*got {value}"):
        read(str(tmp_path / "checkpoint"))

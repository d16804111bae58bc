"""Code that comes with a checkpoint or tokenizer is never run, and no hub is asked for what is a folder's."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.checkpoint import load_checkpoint
from semkv_deploy.memory.source import read_shape
from semkv_deploy.model.tokenizer import no_hub, read_tokenizer

CONFIG = "from transformers import LlamaConfig\nclass Evil(LlamaConfig): model_type = 'evil'\n"
TOKENIZER = "from transformers import PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast): pass\n"
MODEL = "from transformers import LlamaForCausalLM\nclass Evil(LlamaForCausalLM): pass\n"


@pytest.fixture
def hostile(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`hostile(file, code, **changes)`: a checkpoint with changes in a file, and an `evil.py` that leaves a mark.

    The answer yes to every question waits on standard input.
    """
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))

    def make(file: str, code: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n{code}")
        raw = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**raw, **changes}))
        return folder

    return make


CASES = [
    ("config.json", CONFIG, {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}),
    ("config.json", MODEL, {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}),
    ("config.json", MODEL, {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "architectures": ["Evil"]}),
    (
        "tokenizer_config.json",
        TOKENIZER,
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
    ),
    ("tokenizer_config.json", TOKENIZER, {"auto_map": ["evil.Evil", None], "tokenizer_class": "EvilTokenizerFast"}),
]


@pytest.mark.parametrize("load", [load_checkpoint, read_shape, lambda folder: read_tokenizer(Path(folder))])
@pytest.mark.parametrize(("file", "code", "changes"), CASES)
def test_code_does_not_run(
    load: Callable[[str], Any], file: str, code: str, changes: Any, hostile: Callable[..., Path], tmp_path: Path
):
    """Refused in a sentence, or loaded as what transformers itself knows by the name."""
    folder = hostile(file, code, **changes)
    try:
        load(str(folder))
    except SemkvError as error:
        assert "trust_remote_code" not in str(error)
    assert not (tmp_path / "mark").exists()


def test_refusal_says_why(hostile: Callable[..., Path]):
    folder = hostile(*CASES[0][:2], **CASES[0][2])
    with pytest.raises(SemkvError, match="needs Python code that comes with it, and such code is never run"):
        load_checkpoint(str(folder))


def test_pickled_weights_do_not_run(tiny_checkpoint: Path, tmp_path: Path):
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "mark"), "w")

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(SemkvError, match="cannot be loaded"):
        load_checkpoint(str(folder))
    assert not (tmp_path / "mark").exists()


def test_folders_ask_no_hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every look for a host while a folder is loaded, or its memory planned, fails the test."""
    import socket

    from huggingface_hub import constants

    asked: list[object] = []

    def look(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look)
    monkeypatch.setattr(socket.socket, "connect", look)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "_name_or_path": "someone/model"}))
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**raw, "name_or_path": "someone/model"}))
    load_checkpoint(str(folder))
    read_shape(str(folder))
    read_tokenizer(folder)
    assert asked == [] and constants.HF_HUB_OFFLINE is False


def test_no_hub_refuses_what_is_sent(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with no_hub(), pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("someone/model")


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "fast_tokenizer_files"])
def test_tokenizers_name_no_files_elsewhere(key: str, tiny_checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    shutil.copy(folder / "tokenizer.json", tmp_path / "secret.json")
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    for path in (str(tmp_path / "secret.json"), "../secret.json"):
        value = [path] if key == "fast_tokenizer_files" else path
        (folder / "tokenizer_config.json").write_text(json.dumps({**raw, key: value}))
        for load in (load_checkpoint, lambda name: read_tokenizer(Path(name))):
            with pytest.raises(SemkvError, match=f"{key}: names a file outside its folder"):
                load(str(folder))
    # What only its author's machine has says nothing.
    (folder / "tokenizer_config.json").write_text(json.dumps({**raw, "tokenizer_file": "/home/author/tokenizer.json"}))
    read_tokenizer(folder)

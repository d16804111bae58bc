"""Which tokens are delimiters: the rule on texts, byte-level and SentencePiece-like vocabularies, and SmolLM2's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.delimiters import Delimiters, find_delimiters, is_delimiter_text


@pytest.mark.parametrize(
    "text",
    [
        ".",
        ",",
        "?",
        "!",
        ";",
        ":",
        " ",
        "\t",
        "\n",
        "\n\n   ",
        " .",
        ".\n",
        ',"',
        '."',
        "),",
        "...",
        "?!",
        "。",
        "、",
        "．",
    ],
)
def test_delimiter_texts(text: str) -> None:
    assert is_delimiter_text(text) == (text != "．")


@pytest.mark.parametrize(
    "text", ["", " the", "the", "a.", ".com", '"', ")", " (", "-", "://", "\ufffd", " \ufffd", "1,"]
)
def test_other_texts(text: str) -> None:
    assert not is_delimiter_text(text)


def byte_level(entries: list[str], **special: str) -> Any:
    """A byte-level BPE vocabulary: "Ġ" is a space, "Ċ" a newline."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({entry: index for index, entry in enumerate(entries)}, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def sentencepiece(entries: list[str], **special: str) -> Any:
    """A vocabulary as Llama 2 and Gemma have: "▁" is a space, bytes fall back to <0x..>, a leading space is dropped."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({entry: index for index, entry in enumerate(entries)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def chosen(tokenizer: Any) -> set[str]:
    return set(tokenizer.convert_ids_to_tokens(list(find_delimiters(tokenizer).token_ids)))


def test_byte_level_vocabulary() -> None:
    wanted = {".", "Ġ", "Ċ", "ĠĠ", '."', "Ġ.", "ĉ", "ï¼Į", "<|im_end|>", "<|endoftext|>"}
    others = {"the", "Ġthe", '"', "Ġ(", "ï¼", "Ń", "ĠâĢ", "<|im_start|>", "<think>", "</think>"}
    tokenizer = byte_level(sorted(wanted | others), eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>", "<think>"]})
    assert chosen(tokenizer) == wanted


def test_sentencepiece_vocabulary() -> None:
    wanted = {".", "▁", "▁▁", "▁.", "<0x0A>", "<0x2E>", "。", "</s>"}
    others = {"▁the", "the", "<0xE2>", "<0x41>", "<s>", "<unk>", "▁("}
    tokenizer = sentencepiece(sorted(wanted | others), eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    assert chosen(tokenizer) == wanted


@pytest.mark.parametrize(
    "name",
    ["<|eot_id|>", "<end_of_turn>", "<eos>", "<|end|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "[EOS]"],
)
def test_end_markers_of_other_families(name: str) -> None:
    tokenizer = byte_level(["a", "b", name, "<|vision_end|>", "<mask>"])
    tokenizer.add_special_tokens({"additional_special_tokens": [name, "<|vision_end|>", "<mask>"]})
    found = find_delimiters(tokenizer)
    assert found.special_token_ids == found.token_ids == (2,)


def test_end_marker_that_is_not_special_is_judged_by_its_text() -> None:
    assert find_delimiters(byte_level(["<|im_end|>", "."])).token_ids == (1,)


def test_smollm2(smollm2: Any) -> None:
    tokenizer = smollm2.checkpoint.tokenizer
    start = time.perf_counter()
    found = find_delimiters(tokenizer)
    assert time.perf_counter() - start < 2
    assert found.special_token_ids == (0, 2)
    assert 300 < len(found.token_ids) < 500
    text = 'Hello, world. It\'s 3.5 (or so):\n\nyes! "No," he said; then a long-winded 你好。'
    pieces = [tokenizer.decode([token]) for token in tokenizer(text).input_ids if token in found.token_ids]
    assert pieces == [",", ".", " ", ".", "):", "\n", "\n", "!", ',"', ";", " ", "。"]


def test_file_round_trip(tmp_path: Path) -> None:
    found = find_delimiters(byte_level([".", "a", "Ċ"]))
    found.write(tmp_path / "delimiters.json")
    assert Delimiters.read(tmp_path / "delimiters.json") == found
    assert found.token_ids == (0, 2)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"token_ids": ["x"], "special_token_ids": []}', '{"symbols": "."}']
)
def test_damaged_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "delimiters.json"
    path.write_text(content)
    with pytest.raises(SemkvError, match="not a delimiter file"):
        Delimiters.read(path)
    with pytest.raises(SemkvError, match="not a delimiter file"):
        Delimiters.read(tmp_path / "missing.json")

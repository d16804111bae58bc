"""A text read and read again, against the tiny checkpoint in transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from semkv_deploy.compiler.reading import PIECE, read_again, reading_tokens
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.config import ModelFacts


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [2 + ord(letter) % 200 for letter in text]


def facts(positions: int) -> Any:
    return SimpleNamespace(max_position=positions)


def test_a_text_is_read_again_as_transformers_reads_it(tiny_checkpoint: Path, tiny_export: Path, tmp_path: Path):
    """The second reading lies behind the first one, in pieces that each see the first one alone."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = ModelFacts.read(tiny_export / "model.json")
    tokens, *_ = reading_tokens(Letters(), model, "It was the best of times, it was the worst. " * 4)
    (found,) = read_again(tiny_export / "decoder.onnx", tmp_path, model, [tokens])
    assert not list(tmp_path.iterdir()) and len(tokens) > PIECE

    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32", attn_implementation="eager")
    expected = [np.zeros((model.kv_heads, len(tokens)), np.float32) for _ in range(model.layers)]
    with torch.no_grad():
        for start in range(0, len(tokens), PIECE):
            cache = DynamicCache()
            reference(torch.tensor([tokens]), past_key_values=cache)
            if not start:
                keys = [layer.keys[0].numpy() for layer in cache.layers]
            piece = torch.tensor([tokens[start : start + PIECE]])
            weights = reference(piece, past_key_values=cache, output_attentions=True).attentions
            for layer, each in enumerate(weights):
                # Of all attention, what the first reading gets.
                old = each[0, :, :, : len(tokens)]
                share = (old / old.sum(-1, keepdim=True)).numpy()
                by_head = share.reshape(model.kv_heads, -1, len(tokens)).max(1)
                expected[layer] = np.maximum(expected[layer], by_head)
    for layer in range(model.layers):
        np.testing.assert_allclose(found.keys[layer], keys[layer], atol=1e-4)
        np.testing.assert_allclose(found.attention[layer], expected[layer], atol=1e-4)


def test_a_long_text_is_read_in_pieces_that_leave_room_for_the_repetition():
    pieces = reading_tokens(Letters(), facts(512), "abc " * 500)
    assert len(pieces) == 5 and {len(piece) for piece in pieces} == {512 - PIECE}


@pytest.mark.parametrize(
    "text, positions, words", [("short", 512, "calibration-text"), ("abc " * 99, 190, "190 tokens")]
)
def test_a_text_or_context_that_is_too_short_is_refused(text: str, positions: int, words: str):
    with pytest.raises(SemkvError, match=f"{words}.*too short to calibrate on"):
        reading_tokens(Letters(), facts(positions), text)

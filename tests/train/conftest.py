"""A tiny random Llama as a student, and dialogues of random tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from semkv_deploy.train.layout import Dialogue


class Loaded(NamedTuple):
    """What `load_checkpoint` gives, as far as training looks at it."""

    model: Any
    tokenizer: Any


def tiny_model() -> Any:
    """A random Llama of 2 layers, 4 heads over 2 KV heads of 8, vocabulary 512, its weights always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def loaded(tokenizer: Any) -> Loaded:
    return Loaded(tiny_model(), tokenizer)


def random_dialogue(seed: int, lengths: tuple[int, ...] = (9, 7, 8), pinned: int = 3) -> Dialogue:
    draw = random.Random(seed)
    tokens = lambda count: tuple(draw.randrange(4, 500) for _ in range(count))  # noqa: E731
    answers = ((len(lengths) - 1, 3, 5),) if lengths[-1] > 5 else ()
    return Dialogue(tokens(pinned), tuple(map(tokens, lengths)), answers)


@pytest.fixture(params=["appended", "spread"])
def student(request: pytest.FixtureRequest) -> Iterator[Any]:
    """With weights that do something on every Nexus row."""
    import torch

    from semkv_deploy.train.recipe import AdapterShape
    from semkv_deploy.train.student import Student

    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")
    shape = AdapterShape(k_max=6, turns_max=3, rank=4, modules=modules, placement=request.param)
    made = Student(tiny_model(), shape, separator=5)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (made.turn, *made.lora_parameters("lora_b")):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    yield made
    made.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a small text of chapters instead of the fetched one."""
    folder = tmp_path / "cache"
    folder.mkdir()
    draw = random.Random(0)
    words = ["the", "of", "and", "garden", "letter", "said", "she", "walked", "morning", "house", "slowly", "sister"]
    chapters = [f"CHAPTER {number}\n" + " ".join(draw.choices(words, k=260)) for number in range(12)]
    (folder / "austen.txt").write_text("\n".join(chapters), encoding="utf-8")
    monkeypatch.setenv("SEMKV_DEPLOY_CACHE", str(folder))
    return folder


SMALL: dict[str, Any] = {
    "model": "tiny",
    "adapter": {"k_max": 64, "turns_max": 4, "rank": 2},
    "data": {
        "sources": [{"name": "austen"}, {"name": "recall"}, {"name": "echo"}],
        "tokens": 120, "turns": [2, 3], "turn": [12, 40], "held_out": 0.25,
    },
    "stages": [
        {"name": "embeddings", "steps": 2, "embeddings": 1e-2, "warmup": 1, "losses": {"match": 1}},
        {"name": "adapter", "steps": 3, "embeddings": 1e-2, "adapter": 1e-2, "losses": {"kd": 1, "attn": 0.1}},
    ],
    "batch": 2,
    "checkpoint_every": 2,
}  # fmt: skip
"""A recipe of a few seconds."""


def small(**changes: Any) -> Any:
    from semkv_deploy.train.recipe import Recipe

    return Recipe.model_validate({**SMALL, **changes})

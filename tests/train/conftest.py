"""A tiny random Llama as a student, and dialogues of random tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
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


@pytest.fixture
def student() -> Iterator[Any]:
    """With weights that do something on every Nexus row."""
    import torch

    from semkv_deploy.train.recipe import AdapterShape
    from semkv_deploy.train.student import Student

    shape = AdapterShape(k_max=6, turns_max=3, rank=4, modules=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"))
    made = Student(tiny_model(), shape, separator=5)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (made.turn, *made.lora_parameters("lora_b")):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    yield made
    made.close()

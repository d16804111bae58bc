"""Rotary facts: found by trying, right for every pairing, absent where layers do not share one table."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.attention import probe
from semkv_deploy.export.config import _max_position, _rotary, model_facts

Build = Callable[..., Any]


def facts(model: Any, **tokenizer: Any) -> Any:
    return model_facts(model, SimpleNamespace(**({"eos_token_id": 2} | tokenizer)), "tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "config", "rotary"),
    [
        ("cohere", {"logit_scale": 0.5}, (8, True)),
        ("glm", {"head_dim": 8, "partial_rotary_factor": 0.5}, (4, True)),
        ("smollm3", {"no_rope_layers": [1, 0]}, None),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, None),
    ],
)
def test_pairings(name: str, config: dict[str, Any], rotary: tuple[int, bool] | None, build_model: Build) -> None:
    model = build_model(name, **config)
    found = _rotary(model, probe(model))
    assert (None if found is None else (found.dim, found.interleaved)) == rotary


@pytest.mark.parametrize("name", ["llama", "cohere", "phi"])
def test_keys_turn_from_any_position_to_any_other(name: str, build_model: Build) -> None:
    model = build_model(name)
    rotary = facts(model).rotary
    here, there = probe(model, position=3), probe(model, position=90)
    for key, want in zip(here.keys, there.keys, strict=True):
        turned = rotary.rotate(rotary.rotate(key.double(), torch.tensor(-3)), torch.tensor(90))
        assert (turned - want).abs().max() < 1e-4
        assert (key - want).abs().max() > 0.1


def test_rotary_scaling_is_kept_apart(build_model: Build) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    rotary = facts(build_model("llama", rope_parameters=rope)).rotary
    assert rotary.attention_scaling == pytest.approx(1.1386, abs=1e-4)


def test_end_tokens_come_from_everywhere(build_model: Build) -> None:
    model = build_model("llama", eos_token_id=[4, 9])
    model.generation_config.eos_token_id = 7
    assert facts(model, eos_token_id=3).eos_token_ids == (3, 4, 7, 9)
    assert facts(model, eos_token_id=None).eos_token_ids == (4, 7, 9)


def test_an_end_token_beyond_every_vocabulary_is_one_sentence(build_model: Build) -> None:
    model = build_model("llama", eos_token_id=10**9)
    with pytest.raises(SemkvError, match=r"tiny: eos_token_ids.*expected less than 16777216, got 1000000000"):
        facts(model)


def test_windows(build_model: Build) -> None:
    assert facts(build_model("gemma2", head_dim=16, sliding_window=6)).windows == (6, 0)


def test_a_longest_sequence_is_required() -> None:
    config: Any = SimpleNamespace(model_type="endless")
    with pytest.raises(SemkvError, match=r"endless: .*max_position_embeddings"):
        _max_position(config)

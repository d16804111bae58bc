"""Architectures the operator cannot express are refused by name, and rotary tables that change are held still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.attention import probe
from semkv_deploy.export.config import _max_position, _rotary
from semkv_deploy.export.decoder import ReferenceDecoder
from semkv_deploy.export.tidy import _check_attention

Build = Callable[..., Any]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8}, r"GptOssAttention, layer 0: .*s_aux"),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
        r"DeepseekV3Attention, layer 0: head sizes .*multi-head latent attention",
    ),
    "mamba": ({}, r"MambaForCausalLM: .*0 of its 2 layers attend"),
    "bloom": ({"n_layer": 2, "n_head": 4}, r"BloomForCausalLM: .*attention interface"),
    "stablelm": ({}, r"StableLmAttention, layer 0: .*keyword arguments"),
    "gemma3_text": ({"head_dim": 16, "use_bidirectional_attention": True}, r"Gemma3Attention, layer 0: .*directional"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, build_model: Build) -> None:
    config, sentence = REFUSED[name]
    model = build_model(name, **config)
    before = model.config._attn_implementation
    with pytest.raises(SemkvError, match=sentence):
        ReferenceDecoder(model)
    assert model.config._attn_implementation == before


def test_layers_of_different_shape_are_refused(build_model: Build) -> None:
    model = build_model("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = (torch.nn.Linear(32, 8, bias=False) for _ in range(2))
    with pytest.raises(SemkvError, match=r"layers differ .*\(4, 1, 8\), \(4, 2, 8\)"):
        probe(model)


def test_missing_inputs_are_named(build_model: Build) -> None:
    decoder = ReferenceDecoder(build_model("llama"))
    with pytest.raises(SemkvError, match=r"inputs are missing .*length, slot_bias\.01"):
        inputs = {**decoder.empty_caches(1, 8), **dict.fromkeys(("input_ids", "position_ids", "logits_index"))}
        del inputs["slot_bias.01"]
        decoder(inputs)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["past_key_values.00.key"], "exactly one attention node per layer"),
        (["past_key_values.01.key", "past_key_values.00.key"], "out of order"),
    ],
)
def test_graphs_with_wrong_attention_are_refused(names: list[str], sentence: str) -> None:
    caches = [ir.Value(name=name) for name in names]
    nodes = [ir.Node("semkv", "NexusAttention", [None, None, None, cache]) for cache in caches]
    with pytest.raises(SemkvError, match=sentence):
        _check_attention(ir.Graph(caches, [], nodes=nodes), layers=2)


def test_foreign_operators_are_refused() -> None:
    value = ir.Value(name="x")
    with pytest.raises(SemkvError, match=r"foreign domain .*pkg\.other"):
        _check_attention(ir.Graph([value], [], nodes=[ir.Node("pkg.other", "Mystery", [value])]), layers=0)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.5] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "config", "limit"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, 32),
        ("llama", {"rope_parameters": DYNAMIC}, 128),
    ],
)
def test_rotary_that_depends_on_length_is_held(
    name: str, config: dict[str, Any], limit: int, build_model: Build, conversation: Any
) -> None:
    """Up to the first table's limit the export is the model, past it the table stays; the model is left as it was."""
    model = build_model(name, **config)
    assert _max_position(model.config) == limit
    decoder = ReferenceDecoder(model)
    logits, _ = conversation.play(decoder, decoder.empty_caches(2, 40), 2)
    for row, got in enumerate(logits):
        assert (got - conversation.plain(model, row)[0]).abs().max() <= 1e-4
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.int64), position_ids=torch.tensor([[limit + 30]]))
    table = model.model.rotary_emb
    switched = table.inv_freq.clone()
    assert (switched != table.original_inv_freq).any()
    rotary = _rotary(model, probe(model))
    assert rotary is not None
    assert torch.equal(torch.tensor(rotary.inv_freq), table.original_inv_freq)
    assert torch.equal(table.inv_freq, switched)
    assert table.rope_type == config["rope_parameters"]["rope_type"]

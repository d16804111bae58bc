"""Every family against transformers with its own attention and cache: in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from semkv_deploy.export.attention import probe
from semkv_deploy.export.config import _rotary
from semkv_deploy.export.decoder import ReferenceDecoder, cache_names

NAMES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
CAPACITY = 40
TOLERANCE = 1e-4


@dataclass
class Subject:
    name: str
    model: Any
    path: Path
    decoder: ReferenceDecoder
    run: Callable[..., Any]


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest, exported_family: Any, open_onnx: Any) -> Subject:
    """One tiny model of a family, exported and opened."""
    exported = exported_family(request.param)
    return Subject(
        request.param, exported.model, exported.path, ReferenceDecoder(exported.model), open_onnx(exported.path)
    )


def test_every_family_is_covered(families: Any) -> None:
    assert sorted(families) == sorted(NAMES)


def test_reference_agrees_with_transformers(subject: Subject, conversation: Any) -> None:
    logits, _ = conversation.play(
        subject.decoder, subject.decoder.empty_caches(2, CAPACITY), len(subject.decoder.layers)
    )
    for row, got in enumerate(logits):
        want, _ = conversation.plain(subject.model, row)
        assert (got - want).abs().max() <= TOLERANCE
    assert subject.model.config._attn_implementation == "eager"


def test_onnx_agrees_with_transformers(subject: Subject, conversation: Any) -> None:
    """Logits of every token, and what is in the caches at the end: windowed layers of transformers keep a tail only."""
    logits, caches = conversation.play(
        subject.run, subject.decoder.empty_caches(2, CAPACITY), len(subject.decoder.layers)
    )
    for row, got in enumerate(logits):
        want, cache = conversation.plain(subject.model, row)
        assert want.abs().max() > 1
        assert (got - want).abs().max() <= TOLERANCE
        end = conversation.lengths[row] + conversation.steps
        for layer in range(len(subject.decoder.layers)):
            own = cache.layers[layer]
            for name, kept in zip(
                cache_names(layer, len(subject.decoder.layers))[:2], (own.keys, own.values), strict=True
            ):
                tail = caches[name][row, :, end - kept.shape[2] : end]
                assert kept.shape[2] > 1
                assert (tail - kept[0]).abs().max() <= TOLERANCE


def test_reference_agrees_with_onnx_from_any_cache(subject: Subject) -> None:
    """Caches a compressor may leave: other lengths per layer, biases, a dead slot, garbage past the end."""
    generator = torch.Generator().manual_seed(3)
    empty = subject.decoder.empty_caches(2, 16)
    inputs = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in empty.items()}
    inputs["slot_bias.00"][1, :, 2] = -math.inf
    inputs["input_ids"] = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs["position_ids"] = torch.tensor([[30, 31, 32], [70, 71, 72]])
    inputs["logits_index"] = torch.tensor([[2], [0]])
    inputs["length"] = torch.tensor([[4, 9], [13, 5]])[: len(subject.decoder.layers)]
    want, got = subject.decoder(inputs), subject.run(inputs)
    assert want["logits"].shape == (2, 1, subject.model.config.vocab_size)
    assert sorted(want) == sorted(got)
    for name, tensor in want.items():
        assert (tensor - got[name]).abs().max() <= TOLERANCE, name


def test_attention_nodes(subject: Subject, families: Any) -> None:
    family = families[subject.name]
    graph = onnx.load(subject.path, load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain == "semkv"]
    assert [node.name for node in nodes] == [f"layers.{layer:02d}.attention" for layer in range(len(family.windows))]
    for node, window in zip(nodes, family.windows, strict=True):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes.keys() == {"scale", "causal", "softcap", "window"}
        assert (attributes["window"], attributes["softcap"], attributes["causal"]) == (window, family.softcap, 1)


def test_rotary_facts(subject: Subject, families: Any) -> None:
    rotary = _rotary(subject.model, probe(subject.model))
    assert (None if rotary is None else (rotary.dim, rotary.interleaved)) == families[subject.name].rotary

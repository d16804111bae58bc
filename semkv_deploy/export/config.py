"""A loaded model's facts: what its layers did when one token was run through them, and what its configuration says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import semkv_deploy
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.attention import Probe, nexus_attention, probe, unsupported
from semkv_deploy.model.config import ModelFacts, Rotary
from semkv_deploy.model.template import ChatTemplate
from semkv_deploy.model.turns import Turns


def model_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> ModelFacts:
    """Facts of a loaded model.

    Raises:
        SemkvError: when the architecture is not supported.
    """
    config = model.config.get_text_config()
    found = probe(model)
    first = found.layers[0]
    head = model.get_output_embeddings()
    if head is None:
        raise unsupported(model, "it has no language-model head")
    try:
        return ModelFacts(
            family=config.model_type,
            source=source,
            layers=len(found.layers),
            query_heads=first.query_heads,
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=head.weight.shape[0],
            max_position=_max_position(config),
            dtype=str(model.dtype).removeprefix("torch."),
            eos_token_ids=_eos_token_ids(model, tokenizer),
            windows=tuple(layer.window for layer in found.layers),
            rotary=_rotary(model, found),
            versions={
                "semkv-deploy": semkv_deploy.__version__,
                "python": ".".join(map(str, sys.version_info[:2])),
                **{name: version(name) for name in ("onnx", "onnxscript", "torch", "transformers")},
            },
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise SemkvError(
            "its configuration is none of a model",
            where=f"{source}: {'.'.join(map(str, fault['loc']))}",
            expected=fault["msg"].removeprefix("Input should be "),
            got=repr(fault["input"])[:100],
        ) from None


def _max_position(config: PreTrainedConfig) -> int:
    """Longest sequence in tokens; of "longrope" models, as far as the rotary table reaches that is exported."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        raise SemkvError(
            "the configuration names no longest sequence", where=config.model_type, expected="max_position_embeddings"
        )
    return int(longest)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end generation: of the generation settings, the model, the tokenizer and the chat template."""
    ids = set(turn_end_ids(tokenizer))
    generation = getattr(model, "generation_config", None)
    sources = (generation, model.config.get_text_config(), tokenizer)
    for given in (getattr(source, "eos_token_id", None) for source in sources):
        listed = given if isinstance(given, Sequence) else [given]
        ids.update(int(token) for token in listed if isinstance(token, int) and token >= 0)
    return tuple(sorted(ids))


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """With which tokens the chat template ends a reply; none when it has a mistake, which a chat then reports."""
    try:
        template = ChatTemplate.of(tokenizer)
        return Turns(template).end_ids(tokenizer) if template is not None else ()
    except SemkvError:
        return ()


def _rotary(model: PreTrainedModel, at_zero: Probe, position: int = 11) -> Rotary | None:
    """The model's rotary table, if turning back what its layers did at `position` gives their keys at position 0.

    Tried and not read off the configuration: families differ in how they pair values, in how many they rotate, and in
    whether every layer rotates at all.
    """
    tables = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(tables) != 1:
        return None
    with nexus_attention(model):  # a table that may be switched is read as it is held there
        inv_freq = tables[0].inv_freq
        assert isinstance(inv_freq, Tensor)
        frequencies = tuple(inv_freq.double().tolist())
        scaling = float(getattr(tables[0], "attention_scaling", 1.0))
    at_position = probe(model, position=position)
    places = torch.tensor(position)
    for interleaved in (False, True):
        rotary = Rotary(
            inv_freq=frequencies,
            attention_scaling=scaling,
            dim=2 * len(frequencies),
            interleaved=interleaved,
        )
        if all(
            torch.allclose(rotary.rotate(turned.double(), -places), still.double(), rtol=1e-3, atol=1e-4)
            for turned, still in zip(at_position.keys, at_zero.keys, strict=True)
        ):
            return rotary
    return None

"""Models that carry more than keys and values from token to token are refused, by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.attention import probe
from semkv_deploy.export.state import FIRST_PIECE, check_state


def tiny(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **config)).eval()


class Shift(nn.Module):
    """Mixes each token's row with the row before it (a convolution of width two), then goes on as before."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1)
        return self.inner(rows + 0.5 * before)


class Running(nn.Module):
    """Adds the mean of all rows so far: a recurrent state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, rows.shape[1] + 1)[:, None]
        return self.inner(rows + rows.cumsum(1) / count)


@pytest.mark.parametrize("config", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}])
def test_a_plain_decoder_passes(config: dict[str, Any]):
    torch.manual_seed(0)
    check_state(
        LlamaForCausalLM(
            LlamaConfig(
                **{
                    "vocab_size": 61,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "initializer_range": 0.3,
                    **config,
                }
            )
        ).eval()
    )


@pytest.mark.parametrize("kind", [Shift, Running])
@pytest.mark.parametrize("layer", [0, 1])
def test_another_state_is_refused(kind: type[nn.Module], layer: int):
    model: Any = tiny()
    block = model.model.layers[layer]
    block.mlp = kind(block.mlp)
    with pytest.raises(SemkvError, match=rf"logits from token {FIRST_PIECE} on differ .*a state beside its KV cache"):
        probe(model)


def test_a_vocabulary_of_two():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    check_state(LlamaForCausalLM(config).eval())

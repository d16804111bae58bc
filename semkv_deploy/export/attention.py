"""How each layer of a model attends, found by running it; and whether keys and values are all that it carries along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.attend import Attend, LayerSpec, nexus_attention, unsupported
from semkv_deploy.export.state import check_state

__all__ = ["Attend", "LayerSpec", "Probe", "nexus_attention", "probe", "unsupported"]


@dataclass(frozen=True)
class Probe:
    """What `probe` found: every layer's attention and the key it produced for the one token, [kv_heads, head_dim]."""

    layers: tuple[LayerSpec, ...]
    keys: tuple[Tensor, ...]


def probe(model: PreTrainedModel, token: int = 1, position: int = 0) -> Probe:
    """Runs one token through the model with nothing cached, and notes how each layer attends.

    A lone token attends to itself only, so no layer's key depends on the position other than through its rotation.

    Raises:
        SemkvError: when the architecture is not supported, when layers differ in heads or head size, or when the model
            carries more from token to token than keys and values.
    """
    layers: dict[int, LayerSpec] = {}
    keys: dict[int, Tensor] = {}

    def attend(layer: int, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer in layers:
            raise unsupported(model, f"layer {layer} attends more than once")
        layers[layer], keys[layer] = spec, key[0, :, 0].clone()
        return value.repeat_interleave(spec.query_heads // spec.kv_heads, dim=1)

    with nexus_attention(model), torch.no_grad():
        try:
            model(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[position]]),
                use_cache=False,
                semkv_attend=attend,
            )
        except SemkvError:
            raise
        except Exception as error:
            raise unsupported(model, f"{type(error).__name__}: {error}") from error
    expected = int(model.config.get_text_config().num_hidden_layers)
    if sorted(layers) != list(range(expected)):
        raise unsupported(model, f"{len(layers)} of its {expected} layers attend")
    if len(shapes := {(spec.query_heads, spec.kv_heads, spec.head_dim) for spec in layers.values()}) > 1:
        raise unsupported(model, f"layers differ in (query heads, KV heads, head size): {sorted(shapes)}")
    check_state(model)
    return Probe(tuple(layers[i] for i in range(expected)), tuple(keys[i] for i in range(expected)))

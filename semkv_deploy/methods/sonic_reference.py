"""SONIC's decoder in plain PyTorch: a model's own modules, with what the adapter adds on Nexus rows.

The slow statement that the graph (`sonic_decoder`) is compared with: a loop over rows, no gate, no table of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from semkv_deploy.methods.sonic_adapter import SonicAdapter, check_base

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def with_adapter(model: Any, adapter: SonicAdapter) -> Iterator[None]:
    """Inside the block, a transformers model takes ids of Nexus rows: V + turn x k_max + row.

    Raises:
        SemkvError: when the adapter is for another base model.
    """
    import torch

    embedding = model.get_input_embeddings()
    check_base(adapter, embedding.weight.detach().float().numpy(), model.config.num_hidden_layers)
    vocabulary = model.config.vocab_size
    ids: list[Tensor] = []

    def before_embedding(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids[:] = [given[0]]
        return (given[0].masked_fill(given[0] >= vocabulary, 0),)

    def after_embedding(_: Any, __: Any, rows: Tensor) -> Tensor:
        rows = rows.clone()
        for b, s in (ids[0] >= vocabulary).nonzero().tolist():
            turn, row = divmod(int(ids[0][b, s]) - vocabulary, adapter.k_max)
            rows[b, s] = torch.from_numpy(adapter.rows(turn, row + 1)[row])
        return rows

    def added(layer: int, module: str) -> Any:
        a, b = (torch.from_numpy(weight) for weight in adapter.lora(layer, module))

        def after(_: Any, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
            result = result.clone()
            for row, s in (ids[0] >= vocabulary).nonzero().tolist():
                result[row, s] += b @ (a @ given[0][row, s])
            return result

        return after

    handles = [
        embedding.register_forward_pre_hook(before_embedding),
        embedding.register_forward_hook(after_embedding),
    ]
    layers = model.get_decoder().layers
    for layer, module in adapter.modules:
        (owner,) = (each for name, each in layers[layer].named_modules() if name.rpartition(".")[2] == module)
        handles.append(owner.register_forward_hook(added(layer, module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

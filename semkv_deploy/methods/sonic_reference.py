"""SONIC in plain PyTorch: the slow statements that graphs and sessions are compared with.

`with_adapter` states the decoder: a model's own modules, with what the adapter adds on Nexus rows; a loop over rows, no
gate, no table of sums. `masked_logits` states the method: a whole conversation at once, nothing dropped but hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from semkv_deploy.methods.sonic_adapter import SonicAdapter, check_base
from semkv_deploy.model.spread import rank_of, spread_order

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def with_adapter(model: Any, adapter: SonicAdapter) -> Iterator[None]:
    """Inside the block, a transformers model takes ids of Nexus rows: V + number, or of spread rows V + number x V +
    token, number being turn x k_max + row.

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
            number, token = int(ids[0][b, s]) - vocabulary, None
            if adapter.placement == "spread":
                number, token = divmod(number, vocabulary)
            turn, row = divmod(number, adapter.k_max)
            rows[b, s] = torch.from_numpy(adapter.rows(turn, row + 1)[row])
            if token is not None:
                rows[b, s] += embedding.weight[token].detach()
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


class Row(NamedTuple):
    """A row of a conversation that nothing was dropped from.

    Attributes:
        id: of a token, or of a Nexus row.
        position: of its own, or of the token that it begins as.
        turn: that it belongs to.
        stays: whether later turns see it.
    """

    id: int
    position: int
    turn: int
    stays: bool


def conversation(
    turns: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]],
    adapter: SonicAdapter,
    *,
    first_id: int,
    sinks: int,
) -> list[Row]:
    """Every row of a conversation, in order.

    Args:
        turns: tokens of each turn, the last one open.
        sizes: of each finished turn, its Nexus rows, and how many of its last tokens stay (0 and any: all stay).
        first_id: of Nexus rows.
    """
    rows: list[Row] = []
    seen = 0
    for turn, tokens in enumerate(turns):
        nexus, recent = sizes[turn] if turn < len(sizes) else (0, len(tokens))
        body = []
        for number, token in enumerate(tokens):
            stays = not nexus or seen < sinks or number >= len(tokens) - recent
            body.append(Row(token, seen, turn, stays))
            seen += 1
        rows += body
        first = min(turn, adapter.turns_max - 1) * adapter.k_max
        if adapter.placement == "spread":
            leaving = [row for row in body if not row.stays]
            order = spread_order([row.id for row in leaving], rank_of(adapter.common))
            for number, place in enumerate(order[:nexus]):
                begins = leaving[place]
                rows.append(Row(first_id + (first + number) * first_id + begins.id, begins.position, turn, True))
            continue
        for number in range(nexus):
            rows.append(Row(first_id + first + number, seen, turn, True))
            seen += 1
    return rows


def masked_logits(model: Any, adapter: SonicAdapter, rows: Sequence[Row]) -> Tensor:
    """Logits `[n,V]` of every row, by transformers' own attention under a mask: nothing is dropped, and no cache.

    A row sees itself and what is before it, if that is of its turn or stays.
    """
    import torch

    hidden = torch.full((1, 1, len(rows), len(rows)), torch.finfo(torch.float32).min)
    for q, row in enumerate(rows):
        for k, other in enumerate(rows[: q + 1]):
            if other.turn == row.turn or other.stays:
                hidden[0, 0, q, k] = 0
    with torch.no_grad(), with_adapter(model, adapter):
        logits: Tensor = model(
            input_ids=torch.tensor([[row.id for row in rows]]),
            position_ids=torch.tensor([[row.position for row in rows]]),
            attention_mask=hidden,
            use_cache=False,
        ).logits
    return logits[0]

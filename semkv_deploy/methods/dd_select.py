"""DD-Select of DynSplit-KV (arXiv 2602.03184): how good a place to cut a text is, from attention; weights by delimiter.

The paper's score of a candidate i (as its reviews have it): the attention that the tokens of a future window F pay to
the retained region O before i, less alpha times what they pay to the discarded region D, averaged over layers, heads
and F. Ours: O is the last `retained` tokens up to i, D all before them, F the `future` tokens behind i; scores are
taken once, on texts of several domains, and averaged by delimiter token id (few occurrences pull a weight less far from
the domain's mean); a weight is in standard deviations of its domain's scores. So a look-up is all that remains at run
time. `segment_online` is the other form: each candidate of the text at hand has a score of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from semkv_deploy.methods.calibration import Settings
from semkv_deploy.model.blocks import UNIT, BlockRule, DomainWeights, segment

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PRIOR = 2.0
"""Occurrences of an average delimiter that are added to each token id's."""

MOST = 4.0
"""Standard deviations that a weight is at most."""


class Regions(NamedTuple):
    """Regions around a candidate, in tokens, and what attention to the discarded one costs."""

    retained: int
    future: int
    alpha: float


class LayerAttention(NamedTuple):
    """What attention of one layer is made of: `query` `[Hq,n,D]`, `key` `[Hkv,n,D]`, rotary embedding applied.

    `scale` and `softcap` are those of the operator, 0: 1/sqrt(D), none.
    """

    query: NDArray[np.float32]
    key: NDArray[np.float32]
    scale: float
    softcap: float


class DomainText(NamedTuple):
    """A text of one domain, as the uncompressed model reads it.

    Attributes:
        domain: such as prose.
        tokens: `[n]` ids.
        candidate: `[n]` bool: tokens that may end a block.
        layers: some of the model's, without sliding windows.
    """

    domain: str
    tokens: NDArray[np.int64]
    candidate: NDArray[np.bool_]
    layers: list[LayerAttention]


class DelimiterTable(Settings):
    """What calibration learned of delimiters.

    Attributes:
        vocab_size: of the model whose tokenizer's ids these are.
        token_ids: delimiters that the texts have.
        domains: weights of these, then of any other, and their shares of a domain's delimiters.
        tokens: by domain, tokens read.
        candidates: by domain, delimiters scored.
    """

    vocab_size: int
    token_ids: tuple[int, ...]
    domains: tuple[DomainWeights, ...]
    tokens: tuple[int, ...]
    candidates: tuple[int, ...]


def candidate_score(layers: Sequence[LayerAttention], i: int, regions: Regions) -> float:
    """The slow statement: the score of a candidate at position i, one layer, head and query at a time."""
    import torch

    scores = []
    for layer in layers:
        group = len(layer.query) // len(layer.key)
        for h, rows in enumerate(torch.from_numpy(layer.query).double()):
            keys = torch.from_numpy(layer.key[h // group]).double()
            for q in range(i + 1, i + 1 + regions.future):
                weights: Tensor = torch.softmax(_logits(rows[q], keys[: q + 1], layer), -1)
                first = i + 1 - regions.retained
                scores.append(weights[first : i + 1].sum() - regions.alpha * weights[:first].sum())
    return float(torch.stack(scores).mean())


def _logits(row: Any, keys: Any, layer: LayerAttention) -> Any:
    logits = keys @ row * (layer.scale or keys.shape[-1] ** -0.5)
    return layer.softcap * (logits / layer.softcap).tanh() if layer.softcap else logits


def candidate_scores(
    layers: Sequence[LayerAttention], candidates: NDArray[np.int64], regions: Regions
) -> NDArray[np.float64]:
    """`candidate_score` of many: a product, a softmax and running sums for each head."""
    total = np.zeros(len(candidates))
    heads = 0
    for layer in layers:
        group, size = len(layer.query) // len(layer.key), layer.query.shape[1]
        later = np.triu(np.ones((size, size), bool), 1)
        for h, rows in enumerate(layer.query):
            logits = rows @ layer.key[h // group].T * np.float32(layer.scale or 1 / math.sqrt(rows.shape[-1]))
            if layer.softcap:
                logits = layer.softcap * np.tanh(logits / layer.softcap)
            logits[later] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            # before[q, k]: what query q pays to keys below k.
            before = np.concatenate([np.zeros((size, 1)), np.cumsum(weights, -1, dtype=np.float64)], 1)
            rows_of = candidates[:, None] + 1 + np.arange(regions.future)
            discarded = before[rows_of, (candidates + 1 - regions.retained)[:, None]]
            retained = before[rows_of, (candidates + 1)[:, None]] - discarded
            total += (retained - regions.alpha * discarded).mean(1)
            heads += 1
    return total / max(heads, 1)


def online_scores(text: DomainText, regions: Regions, *, every: int = 1) -> NDArray[np.float64]:
    """`[n]` scores of a text's candidates, from the queries of a prompt; NaN of what is none.

    Args:
        every: of how many queries behind a candidate one is taken, from the first on.

    At the ends of the text regions are cut off; a candidate behind which there is nothing has no score.
    """
    size = len(text.tokens)
    scores = np.full(size, np.nan)
    for i in np.flatnonzero(text.candidate):
        queries = np.arange(i + 1, min(i + 1 + regions.future, size), every)
        if len(queries):
            scores[i] = np.mean([_of_queries(layer, int(i), queries, regions) for layer in text.layers])
    return scores


def _of_queries(layer: LayerAttention, i: int, queries: NDArray[np.int64], regions: Regions) -> float:
    """What some queries pay to the retained region less alpha times the discarded one, mean over heads and queries."""
    group = len(layer.query) // len(layer.key)
    first = max(i + 1 - regions.retained, 0)
    last = int(queries[-1]) + 1
    keys = np.repeat(layer.key[:, :last], group, 0)
    logits = np.einsum("hqd,hkd->hqk", layer.query[:, queries], keys)
    logits = logits * np.float32(layer.scale or 1 / math.sqrt(keys.shape[-1]))
    if layer.softcap:
        logits = layer.softcap * np.tanh(logits / layer.softcap)
    logits = np.where(np.arange(last) <= queries[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return float((weights[..., first : i + 1].sum(-1) - regions.alpha * weights[..., :first].sum(-1)).mean())


def segment_online(text: DomainText, rule: BlockRule, regions: Regions, *, every: int = 1) -> list[int]:
    """Lengths of a prompt's closed blocks, where each candidate weighs what it scores in this very text.

    The reference of what a table stands for; no target has it: scores are known a window behind, and need the queries
    of several layers on the host, for `candidates x future / every x n` products a head.

    Args:
        rule: its base, search and nearness count; weights are standard deviations of the text's scores.
        every: see `online_scores`.
    """
    scores = online_scores(text, regions, every=every)
    found = np.flatnonzero(~np.isnan(scores))
    values = scores[found]
    spread = float(values.std()) if len(values) else 0.0
    apart = np.clip((values - values.mean()) / spread, -MOST, MOST) if spread > 0 else np.zeros(len(found))
    # Each candidate is a delimiter of its own.
    ids = np.full(len(text.tokens), len(found))
    ids[found] = np.arange(len(found))
    own = DomainWeights(
        name="online",
        weights=(*np.rint(UNIT * apart).astype(int).tolist(), 0),
        log_shares=(0,) * (len(found) + 1),
    )
    alone = BlockRule(
        base=rule.base,
        search=rule.search,
        nearness=rule.nearness,
        token_ids=tuple(range(len(found))),
        domains=(own,) if len(found) else (),
    )
    if not len(found):
        alone = BlockRule(base=rule.base, search=rule.search)
    return segment(alone, ids.tolist(), np.zeros(len(found) + 1, bool))


def delimiter_table(texts: Sequence[DomainText], regions: Regions, vocab_size: int) -> DelimiterTable:
    """Weights of the delimiters of some texts; a domain has one text."""
    ids = tuple(sorted({int(token) for text in texts for token in text.tokens[text.candidate]}))
    domains, scored = [], []
    for text in texts:
        found = np.flatnonzero(text.candidate)
        # Both regions and the window must be there.
        found = found[(found + 1 >= regions.retained) & (found + regions.future < len(text.tokens))]
        scores = candidate_scores(text.layers, found, regions)
        domains.append(_weights(text, ids, dict(zip(found.tolist(), scores.tolist(), strict=True))))
        scored.append(len(found))
    return DelimiterTable(
        vocab_size=vocab_size,
        token_ids=ids,
        domains=tuple(domains),
        tokens=tuple(len(text.tokens) for text in texts),
        candidates=tuple(scored),
    )


def _weights(text: DomainText, ids: Sequence[int], scores: Mapping[int, float]) -> DomainWeights:
    values = np.array(list(scores.values()))
    mean, spread = (float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0)
    weights, shares = [], []
    total = int(text.candidate.sum()) + 0.5 * (len(ids) + 1)
    for token in ids:
        own = [score for i, score in scores.items() if text.tokens[i] == token]
        apart = (sum(own) - mean * len(own)) / (len(own) + PRIOR) / spread if spread > 0 else 0.0
        weights.append(round(UNIT * min(max(apart, -MOST), MOST)))
        count = int((text.tokens[text.candidate] == token).sum())
        shares.append(round(UNIT * math.log((count + 0.5) / total)))
    return DomainWeights(
        name=text.domain, weights=(*weights, 0), log_shares=(*shares, round(UNIT * math.log(0.5 / total)))
    )

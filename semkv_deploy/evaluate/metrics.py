"""Numbers of one example, and what many examples say: means with intervals, ranks, and whether there is headroom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of one token's logits `[V]`."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def mean_nll(logits: NDArray[np.float32], targets: Sequence[int]) -> float:
    """Mean over tokens of -log p(target), in nats, from logits `[n,V]`, a token at a time."""
    return float(np.mean([-log_softmax(row)[target] for row, target in zip(logits, targets, strict=True)]))


def correct(logits: NDArray[np.float32], targets: Sequence[int]) -> int:
    """How many leading targets greedy decoding would give, from the logits `[n,V]` of the targets forced.

    Up to the first token that differs, forced and greedy inputs are the same.
    """
    hits = logits.argmax(-1) == np.array(targets)
    return len(hits) if hits.all() else int(hits.argmin())


class Estimate(NamedTuple):
    """A mean over examples, with its interval."""

    mean: float
    low: float
    high: float


def _resampled(count: int) -> NDArray[np.int64]:
    """The same resamples of `count` examples for everyone: intervals depend on the data only."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of values over examples, with the bootstrap's percentile interval over examples."""
    data = np.asarray(values, np.float64)
    means = data[_resampled(len(data))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(data.mean()), float(low), float(high))


def paired(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mean of `values - others`, example by example: what the examples have in common cancels."""
    return estimate([first - second for first, second in zip(values, others, strict=True)])


def mean_ranks(scores: Mapping[str, Mapping[str, float]], higher_is_better: Mapping[str, bool]) -> dict[str, float]:
    """Mean over tasks of each method's rank, 1 for the best; equal scores share their mean rank.

    Args:
        scores: by task, by method. Only methods that all tasks have are ranked.
    """
    if not scores:
        return {}
    methods = sorted(set.intersection(*(set(of_task) for of_task in scores.values())))
    ranks: dict[str, list[float]] = {method: [] for method in methods}
    for task, of_task in scores.items():
        sign = 1 if higher_is_better[task] else -1
        for method in methods:
            mine = sign * of_task[method]
            better = sum(sign * of_task[other] > mine for other in methods)
            equal = sum(sign * of_task[other] == mine for other in methods)
            ranks[method].append(better + (equal + 1) / 2)
    return {method: float(np.mean(values)) for method, values in ranks.items()}

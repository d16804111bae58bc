"""Predicting from a slot's key and value how much it would be looked at: a ridge regression for each KV head.

KVzap (arXiv 2601.07891) predicts the logarithm of KVzip's score from hidden states; here it is predicted from what lies
in the cache itself: the key, rotated back to position 0 where the model allows it, and the value. So a compressor needs
no more than its group's buffers, on every target, and scores what an earlier compression kept as it scores what came
since. The regression is fitted when a bundle is built, on texts that the uncompressed model reads and reads again; the
manifest says how well it predicts the last of them (`calibration.correlation`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from semkv_deploy.methods import rotation
from semkv_deploy.methods.calibration import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from semkv_deploy.methods.calibration import CalibrationText, Reading
    from semkv_deploy.model.config import ModelFacts

RIDGE = 1e-2
"""Penalty of the regression, relative to the features' mean square."""

LEAST_ATTENTION = 1e-6
"""Attention is taken for this at least before its logarithm is."""


class ScoreWeights(Settings):
    """A linear function of a slot's features for each KV head: the predicted log of the attention it would get.

    Attributes:
        weights: by cache group, for each of its heads: a weight for each feature, then a constant.
        correlation: mean over heads of prediction and truth on the last of several texts, fitted on the others; None
            where there is one text only.
    """

    weights: tuple[tuple[float, ...], ...]
    correlation: float | None


def fit_predictor(model: ModelFacts, text: CalibrationText, sinks: int) -> ScoreWeights:
    """Fits every head of every group on all texts; says how well those of all but the last predict the last."""
    assert text.readings, "a build reads the text again for this method"
    weights, correlations = [], []
    for number, group in enumerate(text.groups):
        rows = []
        for head in group.heads:
            pairs = [_pairs(model, reading, group.layer, head, sinks) for reading in text.readings]
            rows.append(fit([x for x, _ in pairs], [y for _, y in pairs]))
            if len(pairs) > 1:
                held_out = fit([x for x, _ in pairs[:-1]], [y for _, y in pairs[:-1]])
                x, y = pairs[-1]
                correlations.append(np.corrcoef(x @ held_out[:-1] + held_out[-1], y)[0, 1])
        weights.append(tuple(float(f"{weight:.6g}") for row in rows for weight in row))
        text.progress((number + 1) / len(text.groups))
    correlation = round(float(np.mean(correlations)), 3) if correlations else None
    return ScoreWeights(weights=tuple(weights), correlation=correlation)


def feature_count(model: ModelFacts) -> int:
    """Features of a slot in one head: key and value, and their squares."""
    return 4 * model.head_dim


def slot_features(model: ModelFacts, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    """`[...,n,F]` of keys and values `[...,n,D]` of the positions `[...,n]`."""
    import torch

    if rotation.can_unrotate(model):
        assert model.rotary is not None
        key = model.rotary.rotate(key, -position)
    plain = torch.cat([key, value], -1)
    return torch.cat([plain, plain * plain], -1)


def _pairs(
    model: ModelFacts, reading: Reading, layer: int, head: int, sinks: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features `[n,F]` and the log of attention `[n]` of one head's slots behind the sinks."""
    import torch

    key, value = (torch.from_numpy(part[layer][head, sinks:]).double() for part in (reading.keys, reading.values))
    features = slot_features(model, key, value, torch.arange(sinks, sinks + len(key)))
    attention = reading.attention[layer][head, sinks:].astype(np.float64)
    return features.numpy(), np.log(np.maximum(attention, LEAST_ATTENTION))


def fit(features: list[NDArray[np.float64]], wanted: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """`[F+1]` weights and constant of a ridge regression on standardised features."""
    x, y = np.concatenate(features), np.concatenate(wanted)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / deviation
    gram = z.T @ z
    gram[np.diag_indices_from(gram)] += RIDGE * len(z)
    weights = np.linalg.solve(gram, z.T @ (y - y.mean())) / deviation
    return np.append(weights, y.mean() - mean @ weights)

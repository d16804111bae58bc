"""From a budget to similarity thresholds, one for each layer, and what storing weights in fewer bits costs.

A layer's keys decide how much merges at a threshold, and layers differ widely, so each layer gets the threshold at
which a text keeps the share of slots that its budget's first compression must reach.
"""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.bundle import Calibration
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine, inference_session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.budget import StaticProfile
    from semkv_deploy.methods.base import Method
    from semkv_deploy.model.config import ModelFacts

MAX_TOKENS = 1024
CURVE = [round(0.98 - 0.04 * step, 2) for step in range(20)]
"""Thresholds of the curve, falling."""


def calibration_text() -> str:
    """The text that ships with the package: prose, dialogue, a recipe, code."""
    return (importlib.resources.files("semkv_deploy") / "data" / "calibration.txt").read_text(encoding="utf-8")


def forward(decoder: Path, facts: ModelFacts, tokens: list[int]) -> tuple[NDArray[np.float32], OnnxRuntimeEngine]:
    """Logits `[n,V]` of a text and the engine whose caches hold its keys and values."""
    capacity = -(-len(tokens) // 64) * 64
    engine = OnnxRuntimeEngine(decoder, None, facts=facts, batch=1, capacity=capacity)
    logits = []
    for start in range(0, len(tokens), 128):
        piece = np.array([tokens[start : start + 128]], np.int64)
        length = np.full((facts.layers, 1), start, np.int64)
        positions = start + np.arange(piece.shape[1])[None]
        logits.append(engine.run(piece, positions, np.arange(piece.shape[1])[None], length, row=0)[0].copy())
    return np.concatenate(logits), engine


def mean_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean over tokens of KL(reference || other), in nats, from logits `[n,V]`."""
    total = 0.0
    for first, second in zip(reference, other, strict=True):
        p, q = (row.astype(np.float64) - row.max() for row in (first, second))
        log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return total / len(reference)


def kept_curve(
    method: Method,
    facts: ModelFacts,
    engine: OnnxRuntimeEngine,
    chunk: NDArray[np.int64],
    progress: Callable[[float], None],
) -> Calibration | None:
    """Share of slots that each layer keeps at each threshold of `CURVE`; None for methods without thresholds.

    Args:
        engine: holds the text's keys.
        chunk: `[n]` the text's `slot_chunk`.
        progress: called with the share done.
    """
    graph = method.calibration_graph(facts)
    if graph is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.onnx"
        path.write_bytes(graph.SerializeToString())
        session = inference_session(path)
    count, groups = len(chunk), method.groups(facts.kv_heads)
    metadata = np.zeros((2, 1, groups, engine.capacity), np.int64)
    metadata[0, 0, :, :count], metadata[1, 0, :, :count] = np.arange(count), chunk
    kept = []
    for number, layer in enumerate(engine.layers):
        feed: dict[str, Any] = {
            "key_cache": layer.key,
            "value_cache": layer.value,
            "slot_bias": layer.bias,
            "length": np.array([count], np.int64),
            "slot_position": metadata[0],
            "slot_chunk": metadata[1],
        }
        shares = []
        for threshold in CURVE:
            (length,) = session.run(["length_out"], {**feed, "thresholds": np.array([threshold], np.float32)})
            shares.append(round(int(length[0]) / count, 4))
        kept.append(shares)
        progress((number + 1) / facts.layers)
    return Calibration(tokens=count, thresholds=CURVE, kept=kept)


def layer_thresholds(
    method: Method, profile: StaticProfile, curve: Calibration | None, layers: int
) -> list[list[float]]:
    """`[layers][levels]` thresholds of a profile.

    A full cache is compressed from `capacity` to `target` slots with sinks and window untouched; what lies between
    must shrink by the rest, and a layer starts at the threshold that does so on the calibration text.
    """
    if curve is None:
        return [method.thresholds(None) for _ in range(layers)]
    untouched = method.sinks + method.recent_slots(profile.target)
    share = (profile.target - untouched) / (profile.capacity - untouched)
    thresholds = []
    for kept in curve.kept:
        # Shares fall with the threshold; np.interp wants rising abscissae.
        calibrated = float(np.interp(share, kept[::-1], curve.thresholds[::-1]))
        thresholds.append(method.thresholds(round(calibrated, 2)))
    return thresholds

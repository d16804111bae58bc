"""Runs an imported graph beside its original in ONNX Runtime: the same logits, or there is no import.

The original grows its cache, the import has a full one. Rows: a prompt, a piece on top of it, single tokens; then two
rows at once, a prompt and single tokens (GroupQueryAttention takes no piece on a past in several rows); then tokens
far from the first, on caches of random numbers: what a window hides and how late positions are turned shows there.
The numbers have the mean and deviation that each channel has in the model's own slots. Plain normal ones ask a deep
model what it was never asked: a last bit of SmolLM2-135M's caches then moves its logits by 8e-5 of the largest, and by
1.4e-6 as they are here, where one other slot in 1,500 moves them by 1e-3.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.products import use_float32_activations
from semkv_deploy.model.names import LENGTH, LOGITS, LOGITS_INDEX, cache_names, present_names

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from semkv_deploy.model.config import ModelFacts

TOLERANCE = 1e-4
"""Largest difference allowed, as a part of the largest logit: float32 in another order, over the depth of a model."""

_CAPACITY = 64
_PIECES = {1: (13, 5, 1, 1, 1), 2: (9, 1, 1)}
"""Tokens of each run, by batch."""

_LATE, _LATE_PIECES = 1500, (3, 1)
"""Slots before the late runs at most, and their tokens."""

Pasts = list[tuple[str, str, str, str]]
"""Of each layer, in order: the original's past key and value inputs, its present key and value outputs."""


def check_import(original: Path, imported: Path, model: ModelFacts, pasts: Pasts) -> float:
    """Compares the two graphs; returns the largest difference, as a part of the largest logit.

    Raises:
        SemkvError: naming the run, the row and the layer's cache that differ first.
    """
    theirs, ours = _session(original), _session(imported)
    random = np.random.default_rng(0)
    worst = 0.0
    late = min(_LATE, model.max_position - sum(_LATE_PIECES))
    own: dict[str, NDArray[Any]] = {}
    for batch, position, pieces in (
        *((batch, 0, pieces) for batch, pieces in _PIECES.items()),
        (1, late, _LATE_PIECES),
    ):
        grown = _grown(model, pasts, batch, position, random, own)
        full = _full(model, batch, position + _CAPACITY)
        for layer in range(model.layers):
            for name, grows in zip(cache_names(layer, model.layers)[:2], pasts[layer][:2], strict=True):
                full[name][:, :, :position] = grown[grows]
        for number, count in enumerate(pieces):
            tokens = random.integers(0, model.vocab_size, (batch, count))
            where = f"batch {batch}, run {number + 1} ({count} tokens at position {position})"
            expected = _run_theirs(theirs, grown, tokens, position, pasts)
            got = _run_ours(ours, full, tokens, position, model)
            position += count
            for layer in range(model.layers):
                for name, grows in zip(cache_names(layer, model.layers)[:2], pasts[layer][:2], strict=True):
                    live = full[name][:, :, :position]
                    _compare(grown[grows], live, f"{where}, layer {layer}: {grows}")
            worst = max(worst, _compare(expected, got, f"{where}: logits"))
        own = own or grown
    return worst


def _session(path: Path) -> onnxruntime.InferenceSession:
    """A session of a file, products by quantised weights in float32.

    The kernels else round activations to 8 bits, which makes a difference of one unit in the last place of a norm one
    of a percent: no tolerance would then tell an import that is right from one that is nearly right.
    """
    import onnx
    import onnxruntime

    graph = onnx.load(path, load_external_data=False)
    use_float32_activations(graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SemkvError("ONNX Runtime does not load it", where=path, got=reason) from error


def _grown(
    model: ModelFacts,
    pasts: Pasts,
    batch: int,
    slots: int,
    random: np.random.Generator,
    own: dict[str, NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """Caches of random numbers, distributed as those that the model made itself, `own`; without slots: empty ones."""
    shape = (batch, model.kv_heads, slots, model.head_dim)
    caches = {}
    for name in (name for layer in pasts for name in layer[:2]):
        caches[name] = np.zeros(shape, np.float32)
        if slots:
            mean, deviation = (statistic(own[name], axis=2, keepdims=True) for statistic in (np.mean, np.std))
            caches[name] += mean + deviation * random.standard_normal(shape).astype(np.float32)
    return caches


def _full(model: ModelFacts, batch: int, capacity: int) -> dict[str, NDArray[Any]]:
    shape = (batch, model.kv_heads, capacity, model.head_dim)
    caches: dict[str, NDArray[Any]] = {}
    for layer in range(model.layers):
        key, value, bias = cache_names(layer, model.layers)
        caches |= {
            key: np.zeros(shape, np.float32),
            value: np.zeros(shape, np.float32),
            bias: np.zeros(shape[:3], np.float32),
        }
    return caches


def _run_theirs(
    session: onnxruntime.InferenceSession,
    caches: dict[str, NDArray[Any]],
    tokens: NDArray[Any],
    position: int,
    pasts: Pasts,
) -> NDArray[Any]:
    batch, count = tokens.shape
    wanted = {value.name for value in session.get_inputs()}
    feeds: dict[str, Any] = {"input_ids": tokens, **caches}
    if "attention_mask" in wanted:
        feeds["attention_mask"] = np.ones((batch, position + count), np.int64)
    if "position_ids" in wanted:
        feeds["position_ids"] = np.tile(np.arange(position, position + count), (batch, 1))
    presents = {name for layer in pasts for name in layer[2:]}
    logits = next(value.name for value in session.get_outputs() if value.name not in presents)
    names = [logits, *(name for layer in pasts for name in layer[2:])]
    outputs = dict(zip(names, _outputs(session, names, feeds, "the original"), strict=True))
    for key, value, new_key, new_value in pasts:
        caches[key], caches[value] = outputs[new_key], outputs[new_value]
    result: NDArray[Any] = outputs[logits]
    return result


def _run_ours(
    session: onnxruntime.InferenceSession,
    caches: dict[str, NDArray[Any]],
    tokens: NDArray[Any],
    position: int,
    model: ModelFacts,
) -> NDArray[Any]:
    batch, count = tokens.shape
    rows = np.tile(np.arange(count), (batch, 1))
    feeds = {
        "input_ids": tokens,
        "position_ids": rows + position,
        LOGITS_INDEX: rows,
        LENGTH: np.full((model.layers, batch), position),
        **caches,
    }
    wanted = {value.name for value in session.get_inputs()}
    names = [LOGITS, *(name for layer in range(model.layers) for name in present_names(layer, model.layers))]
    outputs = _outputs(session, names, {name: value for name, value in feeds.items() if name in wanted}, "the import")
    for layer in range(model.layers):
        key, value, _ = cache_names(layer, model.layers)
        caches[key], caches[value] = outputs[1 + 2 * layer], outputs[2 + 2 * layer]
    result: NDArray[Any] = outputs[0]
    return result


def _outputs(
    session: onnxruntime.InferenceSession, names: list[str], feeds: dict[str, Any], what: str
) -> list[NDArray[Any]]:
    try:
        found: list[NDArray[Any]] = session.run(names, feeds)
    except Exception as error:
        shapes = {name: list(array.shape) for name, array in feeds.items() if array.ndim == 2}
        reason = " ".join(str(error).split())[:200]
        raise SemkvError(f"ONNX Runtime does not run {what}", where=f"inputs {shapes}", got=reason) from error
    return found


def _compare(expected: NDArray[Any], got: NDArray[Any], where: str) -> float:
    if expected.shape != got.shape:
        raise SemkvError("the import is not the original", where=where, expected=expected.shape, got=got.shape)
    if not np.isfinite(expected).all():
        raise SemkvError("the original's numbers are not finite", where=where)
    scale = max(float(np.abs(expected).max(initial=0)), 1e-6)
    difference = float(np.abs(expected - got).max(initial=0)) / scale
    if not difference <= TOLERANCE:
        raise SemkvError(
            "the import is not the original",
            where=where,
            expected=f"differences up to {TOLERANCE:g} of the largest value",
            got=f"{difference:.3g}",
            fix="report it with the graph; export the checkpoint itself: semkv-deploy export <checkpoint> -o <dir>",
        )
    return difference

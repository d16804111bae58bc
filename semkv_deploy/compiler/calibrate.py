"""The text that methods are calibrated on, as the uncompressed model reads it; and the cost of quantised weights."""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.budget import BudgetProfile
from semkv_deploy.bundle.contract import graph_contract, make_contract
from semkv_deploy.bundle.opened import OpenedBudget
from semkv_deploy.compiler.limits import check_finite
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.calibration import CalibrationText
from semkv_deploy.methods.full import Full
from semkv_deploy.methods.layout import DECODE
from semkv_deploy.model.cache_groups import CacheGroup
from semkv_deploy.model.delimiters import ChunkCounter, Delimiters
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine, inference_session

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from semkv_deploy.choices import CacheType
    from semkv_deploy.methods import Method
    from semkv_deploy.methods.calibration import Reading, Settings
    from semkv_deploy.methods.dd_select import DelimiterTable, DomainText
    from semkv_deploy.model.cache_groups import GroupShare
    from semkv_deploy.model.config import ModelFacts

MAX_TOKENS = 1024
MIN_TOKENS = 64
PREFILL_CHUNK = 128


def calibration_text() -> str:
    """The text that ships with the package: prose, dialogue, a recipe, code."""
    return (importlib.resources.files("semkv_deploy") / "data" / "calibration.txt").read_text(encoding="utf-8")


def calibration_tokens(tokenizer: Any, model: ModelFacts, text: str | None) -> list[int]:
    """The text to calibrate on (None: the one that ships with the package) as token ids, 1,024 at most.

    Raises:
        SemkvError: when it is too short.
    """
    text = text if text is not None else calibration_text()
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)[: min(MAX_TOKENS, model.max_position)]
    if len(tokens) < MIN_TOKENS:
        raise SemkvError(
            "too short to calibrate on",
            where="--calibration-text",
            expected=f"{MIN_TOKENS} tokens or more",
            got=len(tokens),
        )
    return tokens


def decoder_engine(
    decoder: Path,
    model: ModelFacts,
    groups: Sequence[GroupShare],
    tokens: int,
    method: Method | None = None,
    *,
    cache_dtype: CacheType = "float32",
    native: int | None = None,
) -> OnnxRuntimeEngine:
    """Empty caches for a text of so many tokens, and a decoder that appends to them.

    Args:
        decoder: lowered for ONNX Runtime.
        groups: that the decoder has.
        method: whose layout the decoder has; None: that of an uncompressed cache.
        cache_dtype: type of its caches.
        native: version of the native operators that it has.
    """
    import onnx

    capacity = -(-tokens // 64) * 64
    profile = BudgetProfile(
        budget=1.0,
        prefill_chunk=PREFILL_CHUNK,
        cache_bytes=capacity * model.cache_bytes_per_token,
        groups=tuple(
            CacheGroup(layer=group.layer, heads=group.heads, capacity=capacity, keep_slots=capacity) for group in groups
        ),
    )
    graph = graph_contract(
        onnx.load(decoder, load_external_data=False), "decoder", "decoder", decoder.name, groups=range(len(groups))
    )
    contract = make_contract(
        "onnxruntime-cpu",
        profile,
        model,
        method or Full(),
        None,
        max_context=capacity,
        stop_ids=(),
        batch=None,
        dtype=cache_dtype,
        native=native,
        engine_layout=None,
        graphs={DECODE: [graph]},
        appends_only=True,
    )
    return OnnxRuntimeEngine(OpenedBudget(decoder.parent, contract))


def append(
    engine: OnnxRuntimeEngine,
    tokens: Sequence[int],
    length: int,
    *,
    logits: bool = False,
    given: Mapping[str, NDArray[Any]] | None = None,
) -> NDArray[np.float32]:
    """Runs tokens at `length`, which is their first position too; logits `[n,V]`, or those of the last `[1,V]`.

    Args:
        given: step inputs of the layout; 0 where they are not given.
    """
    within = np.arange(len(tokens))[None]
    feeds = {
        **{each.name: np.zeros(each.row_sizes(1), np.int64) for each in engine.contract.cache.step_inputs},
        **(given or {}),
        "input_ids": np.array([tokens], np.int64),
        "position_ids": length + within,
        "logits_index": within if logits else within[:, -1:],
        "length": np.full((len(engine.contract.cache.groups), 1), length, np.int64),
    }
    found: NDArray[np.float32] = engine.run(DECODE, feeds, row=0)["logits"][0]
    return found


def read_text(
    decoder: Path,
    model: ModelFacts,
    groups: Sequence[GroupShare],
    tokens: list[int],
    take: Callable[[NDArray[np.float32]], None],
    method: Method | None = None,
    *,
    cache_dtype: CacheType = "float32",
    native: int | None = None,
) -> OnnxRuntimeEngine:
    """Runs a text through a decoder; the caches of the engine that is returned hold its keys and values.

    Args:
        decoder: lowered for ONNX Runtime.
        groups: that the decoder has.
        take: gets the logits `[m,V]` of the text's pieces, one after the other: all of them are hundreds of megabytes.
        method: whose layout the decoder has; None: that of an uncompressed cache.
        cache_dtype, native: see `decoder_engine`.

    Raises:
        SemkvError: when a logit is NaN or infinite.
    """
    engine = decoder_engine(decoder, model, groups, len(tokens), method, cache_dtype=cache_dtype, native=native)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        logits = append(engine, tokens[start : start + PREFILL_CHUNK], start, logits=True)
        check_finite(logits, decoder.name)
        take(logits)
    return engine


def calibrate(
    method: Method,
    model: ModelFacts,
    engine: OnnxRuntimeEngine,
    tokens: list[int],
    delimiters: Delimiters,
    readings: Sequence[Reading] = (),
    domains: Sequence[DomainText] = (),
    known: DelimiterTable | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Settings | None:
    """What a method makes of what an engine holds of a text, of texts that were read again, and of several domains."""
    sessions: dict[int, Any] = {}

    def run(graph: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if id(graph) not in sessions:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "graph.onnx"
                path.write_bytes(graph.SerializeToString())
                # The graph is kept beside its session, so that no other graph gets its id.
                sessions[id(graph)] = inference_session(path), graph
        session = sessions[id(graph)][0]
        names = [value.name for value in session.get_outputs()]
        given = {value.name: feeds[value.name] for value in session.get_inputs()}
        return dict(zip(names, session.run(names, given), strict=True))

    chunk = ChunkCounter().count(delimiters.table(model.vocab_size)[tokens])
    groups = engine.contract.cache.groups
    return method.calibrate(model, CalibrationText(chunk, groups, engine.read, run, progress, readings, domains, known))


class StoredLogits:
    """Logits of a text in a file: they are as large as a small model's weights.

    Args:
        path: to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, logits: NDArray[np.float32]) -> None:
        """Adds the logits `[m,V]` of the text's next piece."""
        with self._path.open("ab") as file:
            np.ascontiguousarray(logits, np.float32).tofile(file)

    def rows(self, start: int, count: int, width: int) -> NDArray[np.float32]:
        """Rows of `width` logits."""
        row = width * np.dtype(np.float32).itemsize
        return np.fromfile(self._path, np.float32, count * width, offset=start * row).reshape(count, width)


def weight_cost(
    decoder: Path,
    model: ModelFacts,
    groups: Sequence[GroupShare],
    tokens: list[int],
    reference: StoredLogits,
    method: Method,
    *,
    cache_dtype: CacheType = "float32",
    native: int | None = None,
) -> float:
    """Mean KL (nats per token) that a decoder's weights and caches cost on a text whose exact logits are known."""
    total, done = 0.0, 0

    def take(logits: NDArray[np.float32]) -> None:
        nonlocal total, done
        total += len(logits) * mean_kl(reference.rows(done, *logits.shape), logits)
        done += len(logits)

    read_text(decoder, model, groups, tokens, take, method, cache_dtype=cache_dtype, native=native)
    return total / done


def mean_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean over tokens of KL(reference || other), in nats, from logits `[n,V]`."""
    total = 0.0
    for first, second in zip(reference, other, strict=True):
        p, q = (row.astype(np.float64) - row.max() for row in (first, second))
        log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return total / len(reference)

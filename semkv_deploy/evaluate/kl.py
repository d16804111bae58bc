"""What a method costs at a budget: KL of the next-token distribution against the full cache, at equal capacity."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from semkv_deploy.budget import StaticProfile, static_profile
from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler import calibrate
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import AnyMethod, SemantiCache, StreamingLLM
from semkv_deploy.runtime.session import Session
from semkv_deploy.runtime.tokens import ChunkCounter, delimiter_table, load_tokenizer
from semkv_deploy.targets.onnxruntime.build import lower_decoder, save_decoder
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from semkv_deploy.budget_units import BudgetLike


METHODS: dict[str, AnyMethod] = {
    "semanticache": SemantiCache(),
    "… window 3/4": SemantiCache(recent=0.75),
    "… no window": SemantiCache(recent=0),
    "… chunks apart": SemantiCache(neighbours=1),
    "… keys as cached": SemantiCache(merge_keys="cached"),
    "… clusters per head": SemantiCache(cluster_by="head"),
    "… the paper's form": SemantiCache(ladder="paper", merge_keys="cached", sinks=0, recent=0),
    "streaming-llm": StreamingLLM(),
}
"""The default, one change at a time, and the peer at the same capacity."""


@dataclass
class _Text:
    """A text, the full cache's logits `[n,V]` and keys for it, and its chunks."""

    tokens: list[int]
    logits: NDArray[np.float32]
    engine: OnnxRuntimeEngine
    is_delimiter: NDArray[np.bool_]


def evaluate(bundle: Bundle, text: str, count: int, budgets: Sequence[BudgetLike]) -> Iterator[dict[str, Any]]:
    """Rows of method, budget, capacity, KL (nats per token, over the tokens past the capacity), perplexity, evicted.

    Args:
        count: tokens of the text, and the context the budgets are a share of.
    """
    facts = bundle.manifest.model
    tokens = load_tokenizer(bundle.root).encode(text, add_special_tokens=False)[:count]
    if len(tokens) < count:
        raise SemkvError("the text is too short", where="--text", expected=f"{count} tokens", got=len(tokens))
    # Float32 weights and a bias for each head: what every method can run on, and no loss but the method's.
    with tempfile.TemporaryDirectory() as folder:
        decoder = Path(folder) / "decoder.onnx"
        save_decoder(lower_decoder(bundle.root / "onnx" / "decoder.onnx", bias="head", layers=facts.layers), decoder)
        yield from _evaluate(bundle, decoder, tokens, budgets)


def _evaluate(
    bundle: Bundle, decoder: Path, tokens: list[int], budgets: Sequence[BudgetLike]
) -> Iterator[dict[str, Any]]:
    facts, count = bundle.manifest.model, len(tokens)
    delimiters = json.loads((bundle.root / "delimiters.json").read_text(encoding="utf-8"))["token_ids"]
    # Measured on all of a text but calibrated on the bundle's own, so nothing is tuned on what it is judged by.
    logits, engine = calibrate.forward(decoder, facts, tokens)
    given = _Text(tokens, logits, engine, delimiter_table(delimiters, facts.vocab_size))
    calibration = load_tokenizer(bundle.root).encode(calibrate.calibration_text(), add_special_tokens=False)
    _, calibrated = calibrate.forward(decoder, facts, calibration[: calibrate.MAX_TOKENS])
    chunk = ChunkCounter().count(given.is_delimiter[calibration[: calibrate.MAX_TOKENS]])
    for budget in budgets:
        profile = static_profile(budget, count, bytes_per_slot=facts.cache_bytes_per_token)
        for name, method in METHODS.items():
            curve = calibrate.kept_curve(method, facts, calibrated, chunk, lambda share: None)
            thresholds = calibrate.layer_thresholds(method, profile, curve, facts.layers)
            yield {
                "method": name,
                "budget": profile.budget,
                **_measure(bundle, decoder, method, profile, thresholds, given),
            }


def _measure(
    bundle: Bundle,
    decoder: Path,
    method: AnyMethod,
    profile: StaticProfile,
    thresholds: list[list[float]],
    text: _Text,
) -> dict[str, Any]:
    facts = bundle.manifest.model
    graph = method.compressor(facts)
    assert graph is not None
    with tempfile.TemporaryDirectory() as folder:
        compressor = Path(folder) / "compressor.onnx"
        compressor.write_bytes(graph.SerializeToString())
        engine = OnnxRuntimeEngine(
            decoder,
            compressor,
            facts=facts,
            batch=1,
            capacity=profile.capacity,
            groups=method.groups(facts.kv_heads),
        )
    session = Session(
        engine,
        windows=facts.windows,
        method=method,
        profile=profile,
        max_context=len(text.tokens),
        is_delimiter=text.is_delimiter,
        thresholds=thresholds,
    )
    logits = session.prefill(text.tokens, all_logits=True)
    first = profile.capacity
    return {
        "capacity": profile.capacity,
        "kl": calibrate.mean_kl(text.logits[first:], logits[first:]),
        "perplexity": _perplexity(logits[first:-1], text.tokens[first + 1 :]),
        "perplexity_full": _perplexity(text.logits[first:-1], text.tokens[first + 1 :]),
        "compressions": session.stats.runs,
        "compress_s": session.stats.seconds,
        "evicted": session.stats.evicted,
    }


def _perplexity(logits: NDArray[np.float32], tokens: list[int]) -> float:
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, np.array(tokens)[:, None], -1)[:, 0]
    return float(np.exp(np.mean(np.log(np.exp(shifted).sum(-1)) - chosen)))


def run(root: Path, *, text: Path, tokens: int, budgets: Sequence[BudgetLike], as_json: bool) -> None:
    """Prints a table, or JSON.

    Raises:
        SemkvError: when the text is missing or too short, or `tokens` is more than the model takes.
    """
    bundle = Bundle.open(root, only=["onnx/", "tokenizer/", "delimiters.json"])
    if not text.is_file():
        raise SemkvError("no such file", where=f"--text {text}")
    if tokens > bundle.manifest.model.max_position:
        raise SemkvError("beyond the model", where="--tokens", expected=bundle.manifest.model.max_position, got=tokens)
    rows = []
    for row in evaluate(bundle, text.read_text(encoding="utf-8"), tokens, budgets):
        rows.append(row)
        click.echo(f"{row['budget']:g} {row['method']}: KL {row['kl']:.4f}", err=True)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "budget", "method", "KL", "perplexity", "full cache's", "compressions", "evicted", title=f"{tokens} tokens"
    )
    for row in rows:
        table.add_row(
            f"{row['budget']:g}",
            row["method"],
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_full']:.2f}",
            str(row["compressions"]),
            str(row["evicted"]),
        )
    Console().print(table)

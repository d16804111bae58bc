"""What a method costs at a budget: KL of the next-token distribution against the full cache, at equal capacity."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from semkv_deploy.budget import budget_profile
from semkv_deploy.budget_units import BudgetLike
from semkv_deploy.bundle import Bundle, OpenedBudget
from semkv_deploy.bundle.contract import graph_contract, make_contract
from semkv_deploy.compiler import calibrate
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Method, SemantiCache, StreamingLLM
from semkv_deploy.methods.layout import DECODE
from semkv_deploy.model.cache_groups import GroupShare
from semkv_deploy.model.delimiters import Delimiters
from semkv_deploy.runtime.session import Session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.targets.onnxruntime.build import lower_decoder, save_decoder
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.bundle.contract import Contract

METHODS: dict[str, Method] = {
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
    """A text, the full cache's logits `[n,V]` for it, and the calibration text whose keys an engine holds."""

    tokens: list[int]
    logits: NDArray[np.float32]
    calibration: list[int]
    calibrated: OnnxRuntimeEngine


def evaluate(bundle: Bundle, text: str, count: int, budgets: Sequence[BudgetLike]) -> Iterator[dict[str, Any]]:
    """Rows of method, budget, capacity, KL (nats per token, over the tokens past the capacity), perplexity, evicted.

    Args:
        count: tokens of the text, and the context the budgets are a share of.
    """
    model, portable = bundle.manifest.model, bundle.portable()
    tokens = load_tokenizer(bundle.root).encode(text, add_special_tokens=False)[:count]
    if len(tokens) < count:
        raise SemkvError("the text is too short", where="--text", expected=f"{count} tokens", got=len(tokens))
    groups = shares_of(portable.contract)
    # Float32 weights and a bias for each head: what every method can run on, and no loss but the method's.
    with tempfile.TemporaryDirectory() as folder:
        decoder = Path(folder) / "decoder.onnx"
        source = portable.path(portable.contract.decoders[0].onnx)
        save_decoder(lower_decoder(source, bias="head", groups=len(groups)), decoder)
        # Measured on all of a text but calibrated on another, so nothing is tuned on what it is judged by.
        logits, _ = calibrate.forward(decoder, model, groups, tokens)
        calibration = calibrate.calibration_tokens(load_tokenizer(bundle.root), model, None)
        _, calibrated = calibrate.forward(decoder, model, groups, calibration)
        given = _Text(tokens, logits, calibration, calibrated)
        for budget in budgets:
            profile = budget_profile(budget, count, bytes_per_slot=model.cache_bytes_per_token, groups=groups)
            for name, method in METHODS.items():
                yield {"method": name, "budget": profile.budget, **_measure(bundle, decoder, method, profile, given)}


def _measure(bundle: Bundle, decoder: Path, method: Method, profile: BudgetProfile, text: _Text) -> dict[str, Any]:
    """What one method gives at one budget, on a decoder lowered for ONNX Runtime."""
    import onnx

    model = bundle.manifest.model
    method = method.resolve(model)
    delimiters = Delimiters.parse(bundle.read("delimiters.json"), bundle.root / "delimiters.json")
    settings = calibrate.calibrate(method, model, text.calibrated, text.calibration, delimiters)
    every = range(len(profile.groups))
    graph = graph_contract(
        onnx.load(decoder, load_external_data=False), "decoder", "decoder", str(decoder), groups=every
    )
    graphs = {DECODE: [graph]}
    with tempfile.TemporaryDirectory() as folder:
        for number, program in enumerate(method.programs(model, method.layout(model, profile.groups))):
            path = Path(folder) / f"{program.name}.{number}.onnx"
            path.write_bytes(program.graph.SerializeToString())
            compressor = graph_contract(program.graph, path.stem, "compressor", str(path), groups=program.groups)
            graphs.setdefault(program.name, []).append(compressor)
        contract = make_contract(
            "onnxruntime-cpu",
            profile,
            model,
            method,
            settings,
            max_context=len(text.tokens),
            stop_ids=(),
            batch=None,
            dtype="float32",
            engine_layout=None,
            graphs=graphs,
        )
        session = Session(OnnxRuntimeEngine(OpenedBudget(bundle.root, contract)))
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


def shares_of(contract: Contract) -> tuple[GroupShare, ...]:
    """The groups of a contract, with their capacities for shares."""
    return tuple(
        GroupShare(layer=group.layer, heads=group.heads, share=group.capacity) for group in contract.cache.groups
    )


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

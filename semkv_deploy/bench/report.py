"""`bench`: what is asked for is checked, measured, and put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.bench.engines import genai, llama_cpp
from semkv_deploy.bench.machine import machine_facts
from semkv_deploy.bench.rounds import Shape, measure
from semkv_deploy.bench.statistics import ratios
from semkv_deploy.bench.subjects import peers, reserved, subjects_of_bundles
from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike

ROUNDS = 3
"""Of decoding at the end of a single turn; at the end of each of several turns it is one."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        bundles: directories; of one model.
        budgets: that were built in each; empty: all of each.
        contexts: tokens; empty: the smallest of the bundles' limits.
        batches: rows decoded at once.
        tokens: decoded in a round.
        turns: of equal length that a context has.
        rounds: of decoding at the end of each turn; None: 3, or 1 where there are several turns.
        prefills: times that the prompt is read, where there is one turn.
        genai, gguf, transformers: peers.
        llama_caches: cache types of llama.cpp, each a peer.
        llama_server: the program that serves it; None: the package xllamacpp.
        threads: of every runtime; None: the CPUs that this process may use.
    """

    bundles: Sequence[Path]
    budgets: Sequence[BudgetLike] = ()
    contexts: Sequence[int] = ()
    batches: Sequence[int] = (1,)
    tokens: int = 32
    turns: int = 1
    rounds: int | None = None
    prefills: int = 1
    target: str = "onnxruntime-cpu"
    genai: Path | None = None
    gguf: Path | None = None
    llama_caches: Sequence[str] = llama_cpp.CACHE_TYPES[:2]
    llama_server: Path | None = None
    transformers: str | None = None
    threads: int | None = None
    allow_plugins: bool = False


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures a plan.

    Args:
        say: what is done now.

    Returns:
        bundles, tokens, turns, rounds, prefills, threads, machine, runtimes (what they say of themselves), cells (one a
        subject, context and batch; see `rounds.in_turn`) and ratios (see `statistics.ratios`).

    Raises:
        SemkvError: when a context is larger than a bundle's or too small for what is decoded in it, a bundle is of
            another model, a peer's package or model is missing, or a measurement fails.
    """
    from semkv_deploy.targets.onnxruntime.threads import usable_cpus

    bundles = [Bundle.open(root, only=["bundle.json", "tokenizer/"]) for root in dict.fromkeys(plan.bundles)]
    _check_one_model(bundles)
    if plan.genai is not None and plan.turns > 1 and max(plan.batches) > 1:
        raise SemkvError(
            "takes further turns in one row only", where=genai.OPTION, fix="leave out --turns, --batch or --genai"
        )
    shapes = _shapes(plan, bundles)
    text = _text(bundles[0])
    subjects = [
        *subjects_of_bundles(bundles, plan.budgets, plan.target, allow_plugins=plan.allow_plugins),
        *peers(
            genai_model=plan.genai,
            gguf=plan.gguf,
            llama_caches=plan.llama_caches,
            llama_server=plan.llama_server,
            transformers_source=plan.transformers,
            vocabulary=max(text) + 1,
        ),
    ]
    threads = plan.threads or usable_cpus()
    machine = machine_facts()
    runtimes: dict[str, str] = {}
    cells: list[dict[str, Any]] = []
    for shape in shapes:
        found, about = measure(
            subjects, shape, text, threads=threads,
            say=lambda what, shape=shape: say(f"{_place(shape)}: {what}"),  # type: ignore[misc]  # bound as it is
        )  # fmt: skip
        cells += found
        runtimes |= about
    return {
        "bundles": [bundle.root.name for bundle in bundles],
        "tokens": plan.tokens,
        "turns": plan.turns,
        "rounds": shapes[0].rounds,
        "prefills": plan.prefills,
        "threads": threads,
        "machine": machine,
        "runtimes": runtimes,
        "cells": cells,
        "ratios": ratios(cells),
    }


def _place(shape: Shape) -> str:
    rows = f", {shape.batch} rows" if shape.batch > 1 else ""
    return f"{shape.context} tokens{rows}"


def _shapes(plan: Plan, bundles: Sequence[Bundle]) -> list[Shape]:
    """What is done at each context and batch, contexts in rising order."""
    limit = min(bundle.manifest.max_context for bundle in bundles)
    rounds = plan.rounds or (ROUNDS if plan.turns == 1 else 1)
    reserve = max(map(reserved, bundles)) if plan.turns > 1 else 0
    found = []
    for context in sorted(set(plan.contexts or [limit])):
        for batch in sorted(set(plan.batches)):
            shape = Shape(context, batch, plan.turns, plan.prefills, rounds, plan.tokens, reserve)
            if not shape.least_context <= context <= limit:
                raise SemkvError(
                    "out of range",
                    where="--context",
                    expected=f"{shape.least_context} to {limit} tokens",
                    got=context,
                    fix="decode less (--tokens, --rounds, --turns) for a shorter one, or build with a larger "
                    "--max-context for a longer one",
                )
            found.append(shape)
    return found


def _check_one_model(bundles: Sequence[Bundle]) -> None:
    """Fails where bundles are of models that differ: one text of tokens is read by all."""
    first = bundles[0]
    for bundle in bundles[1:]:
        if _shape_of(bundle) != _shape_of(first):
            raise SemkvError(
                "is of another model",
                where=bundle.root,
                expected=f"that of {first.root}",
                fix="measure bundles of one model in one run",
            )


def _shape_of(bundle: Bundle) -> tuple[int, ...]:
    model = bundle.manifest.model
    return model.layers, model.query_heads, model.kv_heads, model.head_dim, model.hidden_size, model.vocab_size


def _text(bundle: Bundle) -> list[int]:
    """Token ids of real text: all read the same ones."""
    from semkv_deploy.compiler.calibrate import calibration_text
    from semkv_deploy.runtime.tokens import load_tokenizer

    return list(load_tokenizer(bundle.root).encode(calibration_text(), add_special_tokens=False))

"""`bench`: time and memory of bundles' budgets, and of their peers beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.options import (
    PATH,
    allow_plugins_option,
    budgets_option,
    json_option,
    target_option,
    threads_option,
)

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=PATH)
@budgets_option()
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(min=256),
    multiple=True,
    help="Tokens of context; may be given several times.  [default: the bundles' max-context]",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=[1],
    show_default=True,
    help="Rows decoded at once; may be given several times.",
)
@click.option(
    "--tokens", type=click.IntRange(min=4), default=32, show_default=True, help="Steps of a round; the first warms up."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Of steps behind a prompt, everybody in turn.  [default: 3, or 1 behind each of several turns]",
)
@click.option(
    "--prefills",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Times that the prompt is read, everybody in turn.",
)
@click.option(
    "--turns",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Turns of equal length that the context has; each ends with --tokens decoded.",
)
@click.option("--genai", type=PATH, help="Peer: an onnxruntime-genai model directory.")
@click.option("--llama-cpp", type=PATH, metavar="GGUF", help="Peer: llama.cpp, through xllamacpp or --llama-server.")
@click.option(
    "--llama-cpp-cache",
    "llama_caches",
    type=click.Choice(["f16", "q8_0", "f32", "bf16", "q4_0"]),
    multiple=True,
    default=["f16", "q8_0"],
    show_default=True,
    help="Type of llama.cpp's cache, each a peer; may be given several times.",
)
@click.option("--llama-server", type=PATH, metavar="PROGRAM", help="llama-server to measure instead of xllamacpp's.")
@click.option(
    "--transformers", metavar="SOURCE", help="Peer: transformers with DynamicCache and StaticCache, on a checkpoint."
)
@click.option("--plot", type=PATH, help="Also draw a picture (needs matplotlib).")
@json_option()
@target_option()
@allow_plugins_option
@threads_option
def bench(
    bundles: tuple[Path, ...],
    budgets: list[Budget],
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    tokens: int,
    rounds: int | None,
    prefills: int,
    turns: int,
    genai: Path | None,
    llama_cpp: Path | None,
    llama_caches: tuple[str, ...],
    llama_server: Path | None,
    transformers: str | None,
    plot: Path | None,
    as_json: bool,
    target: str,
    allow_plugins: bool,
    threads: int | None,
) -> None:
    """Measures time and memory of every budget.

    Of one bundle or several, and of peers beside them: each in a process of its own, all measured in turn.

    \b
    semkv-deploy bench bundle/ --context 2048 --context 8192 --genai smollm2-genai/ --json
    semkv-deploy bench float32/ int8/ --budget 0.2 --llama-cpp SmolLM2-135M-Instruct.Q4_1.gguf
    semkv-deploy bench bundle/ --turns 50 --tokens 16 --plot turns.png
    """
    from semkv_deploy.bench.plots import check, draw
    from semkv_deploy.bench.report import Plan, run
    from semkv_deploy.bench.table import show

    if plot is not None:
        check(plot)
    plan = Plan(
        bundles=bundles,
        budgets=budgets,
        contexts=contexts,
        batches=batches,
        tokens=tokens,
        turns=turns,
        rounds=rounds,
        prefills=prefills,
        target=target,
        genai=genai,
        gguf=llama_cpp,
        llama_caches=llama_caches,
        llama_server=llama_server,
        transformers=transformers,
        threads=threads,
        allow_plugins=allow_plugins,
    )
    output = run(plan, lambda what: click.echo(what, err=True))
    if plot is not None:
        draw(output, plot)
    if as_json:
        click.echo(json.dumps(output, indent=1))
    else:
        show(output)

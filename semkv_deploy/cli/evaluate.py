"""`evaluate`: what each method costs in quality, at equal kept bytes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semkv_deploy.cli.console import progress
from semkv_deploy.cli.options import PATH, budgets_option, json_option, source_argument, threads_option
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget


QUICK_TASKS = ("prose", "passkey", "facts")
QUICK_METHODS = ("importance", "semanticache", "streaming-llm")
"""What `--quick` measures of what was not chosen: each further method is a bundle to build and a cell a task."""


@click.command()
@source_argument
@click.option("-o", "--output", type=PATH, default=Path("evaluation"), show_default=True, help="Results folder.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME[:OPTION=VALUE,…]",
    help="Method, kvpress/NAME for a press of kvpress, or kvpress for eight of them; may be given several times.  "
    "[default: all of ours]",
)
@budgets_option(default=["0.2", "0.5"])
@click.option(
    "--task", "tasks", multiple=True, help="Task; may be given several times.  [default: those for small models]"
)
@click.option("--context", type=click.IntRange(min=64), default=1024, show_default=True, help="Tokens that are read.")
@click.option("--examples", type=click.IntRange(min=2), default=8, show_default=True, help="Of each task.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the examples.")
@click.option("--text", "texts", multiple=True, metavar="NAME=FILE", help="File for a corpus: prose, code or chat.")
@threads_option
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Methods measured side by side.")
@click.option("--kvpress-python", type=PATH, help="Python that has kvpress installed.  [default: this one]")
@click.option(
    "--plots/--no-plots", default=True, help="Draw quality.png and tasks.png.  [default: where matplotlib is]"
)
@click.option("--quick", is_flag=True, help="Few cells: three methods and tasks, 4 examples of 512 tokens.")
@json_option()
def evaluate(
    source: str,
    output: Path,
    methods: tuple[str, ...],
    budgets: list[Budget],
    tasks: tuple[str, ...],
    context: int,
    examples: int,
    seed: int,
    texts: tuple[str, ...],
    threads: int | None,
    jobs: int,
    kvpress_python: Path | None,
    plots: bool,
    quick: bool,
    as_json: bool,
) -> None:
    """Measures what methods cost in quality, at equal kept bytes.

    SOURCE is what `build` takes. The cache is compressed before the question is known. Every cell of the table is
    written to the results folder as it comes, and is not measured again.

    \b
    semkv-deploy evaluate ./my-model --method semanticache --method streaming-llm --budget 0.2 -o evaluation/
    semkv-deploy evaluate ./my-model --method semanticache:recent=0.75 --method kvpress/SnapKV --task passkey
    """
    from semkv_deploy.evaluate.entries import parse_entry
    from semkv_deploy.evaluate.plots import draw
    from semkv_deploy.evaluate.report import markdown
    from semkv_deploy.evaluate.run import Plan
    from semkv_deploy.evaluate.run import evaluate as measure
    from semkv_deploy.evaluate.side_by_side import measure_side_by_side
    from semkv_deploy.evaluate.table import tabulate
    from semkv_deploy.evaluate.tasks import TASKS, task_of
    from semkv_deploy.methods import METHODS

    if quick:
        methods, tasks = methods or QUICK_METHODS, tasks or QUICK_TASKS
        context, examples = min(context, 512), min(examples, 4)
    chosen = methods or tuple(name for name, of in METHODS.items() if name != "full" and not of.learned)
    plan = Plan(
        source=source,
        out=output,
        methods=[parse_entry(text, _value) for text in dict.fromkeys(_spelled_out(chosen))],
        budgets=sorted({_share(budget) for budget in budgets}, reverse=True),
        tasks=[task_of(name) for name in tasks] or [task for task in TASKS.values() if task.by_default],
        context=context,
        examples=examples,
        seed=seed,
        texts=dict(map(_text, texts)),
        threads=threads,
        peers_python=kvpress_python,
    )
    with progress() as report:
        if jobs > 1:
            measure_side_by_side(plan, jobs, report)
        table = tabulate(measure(plan, report))
    (output / "table.json").write_text(json.dumps(table, indent=1, ensure_ascii=False), encoding="utf-8")
    page = markdown(table)
    (output / "README.md").write_text(page, encoding="utf-8")
    if plots and find_spec("matplotlib") is not None:
        draw(table, output)
    click.echo(json.dumps(table, indent=1, ensure_ascii=False) if as_json else page)


def _spelled_out(methods: tuple[str, ...]) -> list[str]:
    """Methods, with `kvpress` replaced by the presses that it stands for."""
    from semkv_deploy.evaluate.entries import PEER, PEERS

    peers = [f"{PEER}{name}" for name in PEERS]
    return [name for method in methods for name in (peers if f"{method}/" == PEER else [method])]


def _value(text: str) -> Any:
    from semkv_deploy.cli.yaml_values import parse

    return parse(text, "--method")


def _share(budget: Budget) -> float:
    """A budget as a share: contexts differ by task, so slots and bytes mean nothing here."""
    if budget.unit != "share" or budget.value >= 1:
        raise SemkvError("not a share below 1", where="--budget", expected="such as 0.2", got=budget)
    return budget.value


def _text(option: str) -> tuple[str, Path]:
    name, equals, file = option.partition("=")
    if not equals:
        raise SemkvError("not of the form NAME=FILE", where="--text", got=option)
    return name, Path(file)

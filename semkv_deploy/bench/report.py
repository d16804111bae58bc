"""`bench`: every budget, and onnxruntime-genai beside it, measured one after the other on the same prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.behaviours import NexusTurns

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike


def run(
    root: Path,
    *,
    budgets: Sequence[BudgetLike] = (),
    context: int | None,
    tokens: int,
    turns: int = 1,
    genai: Path | None,
    plot: Path | None,
    as_json: bool,
    target: str,
    allow_plugins: bool = False,
    threads: int | None = None,
) -> None:
    """Measures, then prints a table or JSON, and draws a picture when asked to.

    Args:
        budgets: that were built; empty: all.
        turns: of equal length that the context has.
        threads: of ONNX Runtime; genai chooses its own.

    Raises:
        SemkvError: when the context is larger than the bundle's, or a measurement fails.
    """
    bundle = Bundle.open(root, only=["bundle.json"])
    limit = bundle.manifest.max_context
    context = limit if context is None else context
    reserve = _reserve(bundle) if turns > 1 else 0
    least = turns * (tokens + 64 + reserve)
    if not least <= context <= limit:
        raise SemkvError("out of range", where="--context", expected=f"{least} to {limit} tokens", got=context)
    if genai is not None and turns > 1:
        raise SemkvError("its runs have one turn", where="--genai", fix="leave out --turns or --genai")
    if genai is not None and not (genai / "genai_config.json").is_file():
        raise SemkvError(
            "not an onnxruntime-genai model",
            where=f"--genai {genai}",
            fix="make one with: python -m onnxruntime_genai.models.builder -i <checkpoint> -o <dir> -p int4 -e cpu",
        )
    results: dict[str, dict[str, Any]] = {}
    requests: list[tuple[str, dict[str, Any]]] = []
    if genai is not None:
        requests.append(("onnxruntime-genai", {"engine": "genai", "path": str(genai)}))
    chosen = {bundle.share(budget) for budget in budgets} or bundle.manifest.budgets
    for share in sorted(chosen, reverse=True):
        request = {"engine": "bundle", "path": str(root), "target": target, "budget": share}
        options = {"turns": turns, "reserve": reserve, "allow_plugins": allow_plugins, "threads": threads}
        requests.append((f"budget {share:g}", {**request, **options}))
    for name, request in requests:
        click.echo(f"measuring {name} at {context} tokens …", err=True)
        results[name] = _measure({**request, "context": context, "tokens": tokens})
    output = {
        "bundle": root.name,
        "context": context,
        "tokens": tokens,
        "turns": turns,
        "results": results,
        "ratios": _ratios(results, whole=turns > 1),
    }
    if plot is not None:
        _draw(output, plot)
    if as_json:
        click.echo(json.dumps(output, indent=1))
    else:
        _table(output)


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "semkv_deploy.bench.worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise SemkvError(f"measurement failed: {last}", where=request["path"])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _reserve(bundle: Bundle) -> int:
    """Positions that the method may take at a turn's end: free at every budget, so that all do the same work."""
    behaviours = [
        behaviour
        for record in bundle.manifest.targets.values()
        for built in record.budgets
        for behaviour in built.contract.behaviours
    ]
    return max((each.most for each in behaviours if isinstance(each, NexusTurns)), default=0)


def _ratios(results: dict[str, dict[str, Any]], *, whole: bool) -> dict[str, float]:
    """Times and memory of the full cache over each smaller one, and of budget 1 over genai.

    Args:
        whole: of all turns together as well.
    """
    ratios = {}
    full = results.get("budget 1")
    if full:
        for name, result in results.items():
            if name.startswith("budget") and result is not full:
                ratios[f"decode: budget 1 / {name}"] = full["decode_ms"] / result["decode_ms"]
                if whole:
                    ratios[f"all turns: budget 1 / {name}"] = full["total_s"] / result["total_s"]
                if "peak_mib" in result:
                    ratios[f"peak memory: budget 1 / {name}"] = full["peak_mib"] / result["peak_mib"]
    peer = results.get("onnxruntime-genai")
    if peer:
        for name, result in results.items():
            if result is not peer:
                ratios[f"decode: onnxruntime-genai / {name}"] = peer["decode_ms"] / result["decode_ms"]
    for name, result in results.items():
        if result.get("compress_s"):
            ratios[f"compression share of prefill, {name}"] = result["compress_s"] / result["prefill_s"]
    return {name: round(value, 3) for name, value in ratios.items()}


def _draw(output: dict[str, Any], path: Path) -> None:
    """Bars of decode time and of memory beside the weights, one for each measurement."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(output["results"])
    figure, panels = plt.subplots(1, 2, figsize=(9, 1.1 + 0.45 * len(names)), sharey=True, layout="constrained")
    shown = {"decode_ms": "decode, ms per token", "peak_mib": "memory beside weights, MiB"}
    for panel, (key, label) in zip(panels, shown.items(), strict=True):
        values = [output["results"][name].get(key, 0) for name in names]
        colours = ["#9aa5b1" if name.startswith("onnxruntime") else "#2563a8" for name in names]
        labels = [f"{value:.0f}" if value else "not measured" for value in values]
        panel.bar_label(panel.barh(names, values, color=colours), labels, padding=3)
        panel.set_xlabel(label)
        panel.set_xlim(0, max(values) * 1.15 or 1)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(f"{output['bundle']}, {output['context']} tokens of context", fontsize=11)
    figure.savefig(path, dpi=110)


def _table(output: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from semkv_deploy.terminal import printable, show_table

    console = Console()
    table = Table(title=f"{escape(printable(output['bundle']))} at {output['context']} tokens of context")
    columns = (
        "",
        "decode ms",
        "prefill s",
        "all s",
        "compressing s",
        "live slots",
        "cache read MiB/step",
        "peak MiB beside weights",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, result in output["results"].items():

        def cell(key: str, form: str, row: dict[str, Any] = result) -> str:
            return format(row[key], form) if key in row else ""

        table.add_row(
            name,
            cell("decode_ms", ".1f"),
            cell("prefill_s", ".1f"),
            cell("total_s", ".1f"),
            cell("compress_s", ".2f"),
            cell("kept", ".0f"),
            cell("read_mib", ".1f"),
            cell("peak_mib", ".0f"),
        )
    show_table(console, table)
    for name, value in output["ratios"].items():
        console.print(f"{name}: {value:.3g}")

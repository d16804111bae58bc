"""The table that `bench` prints, what it ran on, and the ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from semkv_deploy.bench.engines.llama_cpp import compiled_below
from semkv_deploy.sizes import size
from semkv_deploy.terminal import printable, show_table

Cell = dict[str, Any]
Column = tuple[str, Callable[[Cell], str]]


def show(output: dict[str, Any]) -> None:
    """Prints what `report.run` returned."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=escape(printable(", ".join(output["bundles"]))))
    shown = columns(output["cells"])
    for number, (name, _) in enumerate(shown):
        table.add_column(name, justify="right" if number else "left")
    for cell in output["cells"]:
        table.add_row(*(escape(printable(text(cell))) for _, text in shown))
    show_table(console, table)
    for line in conditions(output):
        console.print(escape(printable(line)), highlight=False)
    if output["ratios"]:
        show_table(console, _ratio_table(output["ratios"]))


def columns(cells: Sequence[Cell]) -> list[Column]:
    """Those that tell something: a batch where one is not 1, all turns where there are several."""
    batches = any(cell["batch"] > 1 for cell in cells)
    turns = any(len(cell["turns"]) > 1 for cell in cells)
    found: list[Column | None] = [
        ("", lambda cell: cell["name"]),
        ("cache", lambda cell: cell["cache"]),
        ("context", lambda cell: str(cell["context"])),
        ("rows", lambda cell: str(cell["batch"])) if batches else None,
        ("TTFT s", _spread("ttft_s", ".2f")),
        ("TPOT ms", _spread("tpot_ms", ".1f")),
        ("tokens/s", _spread("tokens_per_s", ".1f")) if batches else None,
        ("all turns s", _plain("total_s", ".1f")) if turns else None,
        ("compressing s", _compressing),
        ("live slots", _plain("live_slots", ".0f")),
        ("cache MiB", _plain("cache_mib", ".1f")),
        ("read MiB/step", _plain("read_mib", ".1f")),
        ("peak MiB beside weights", _plain("peak_mib", ".0f")),
        ("process MiB", _plain("process_mib", ".0f")),
    ]
    return [column for column in found if column is not None]


def _plain(key: str, form: str) -> Callable[[Cell], str]:
    """A value; nothing where it is not known."""
    return lambda cell: format(cell[key], form) if key in cell else ""


def _spread(key: str, form: str) -> Callable[[Cell], str]:
    return lambda cell: spread_text(cell[key], form)


def _compressing(cell: Cell) -> str:
    """Seconds of compression in the prompt, or in all of several turns, and what share of its time they are."""
    if "compress_s" not in cell:
        return ""
    one = "ttft_compress_s" in cell
    seconds = cell["ttft_compress_s"] if one else cell["compress_s"]
    share = seconds / (cell["ttft_s"]["all"][-1] if one else cell["total_s"])
    return f"{seconds:.2f} ({share:.0%})"


def spread_text(spread: dict[str, Any], form: str) -> str:
    """The median, and where there are several values the least and the most: `21.7 (21.5–22.9)`."""
    median, least, most = (format(spread[key], form) for key in ("median", "min", "max"))
    return f"{median} ({least}–{most})" if len(spread["all"]) > 1 else median


def conditions(output: dict[str, Any]) -> list[str]:
    """What was done, on what."""
    machine, turns = output["machine"], output["turns"]
    llama = output["runtimes"].get("llama.cpp")
    below = compiled_below(llama, machine["simd"]) if llama else None
    what = f"{turns} turns" if turns > 1 else f"{output['prefills']} × the prompt"
    rounds = f"{output['rounds']} × {output['tokens']} steps{' each' if turns > 1 else ''}"
    return [
        f"{what}, {rounds}, in turn; median (least–most); threads of each: {output['threads']}",
        f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable, "
        f"{' '.join(machine['simd'])}; {size(machine['memory_bytes'])}; load {machine['load']} before",
        f"native operators: {machine['native_operators']}",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        *(f"{name}: {said}" for name, said in output["runtimes"].items() if said != machine["versions"].get(name)),
        *([below] if below else []),
    ]


def _ratio_table(ratios: Sequence[dict[str, Any]]) -> Any:
    """A row for each pair at each context and batch: how many times the first is the second."""
    from rich.markup import escape
    from rich.table import Table

    whats = list(dict.fromkeys(each["what"] for each in ratios))
    table = Table(title="how many times the one is the other, in the same round")
    table.add_column("")
    for name in ("context", "rows", *whats):
        table.add_column(name, justify="right")
    pairs: dict[tuple[str, str, int, int], dict[str, str]] = {}
    for each in ratios:
        pair = (each["over"], each["under"], each["context"], each["batch"])
        pairs.setdefault(pair, {})[each["what"]] = spread_text(each, ".2f")
    for (over, under, context, batch), values in pairs.items():
        name = escape(printable(f"{over} ÷ {under}"))
        table.add_row(name, str(context), str(batch), *(values.get(what, "") for what in whats))
    return table

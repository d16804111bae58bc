"""A table for people: Markdown, of the data that `table.tabulate` gives."""

from __future__ import annotations

from typing import Any


def markdown(table: dict[str, Any]) -> str:
    """The table as a Markdown page: one table for each budget, with everything a reader must know beside it."""
    reported = [name for name, task in table["tasks"].items() if task["reported"]]
    parts = [
        f"# {table['model']}: quality at equal kept bytes",
        "",
        f"{table['context']} tokens of context, {table['examples']} examples for each task, seed {table['seed']}. "
        "Query-agnostic: the cache is compressed before the question is known, for every method. "
        "In brackets the 95 % bootstrap interval over examples. `kept` is what the cache held when the question came, "
        f"of the full cache's bytes (keys, values and biases, measured). {_held(table)}",
        "",
    ]
    for budget, ranks in sorted(table["mean_rank"].items(), key=lambda item: -float(item[0])):
        rows = [row for row in table["rows"] if f"{row['budget']:g}" == budget]
        parts += [f"## {float(budget):.0%} kept", "", *_table(table, rows, reported, ranks), ""]
    hidden = [name for name in table["tasks"] if name not in reported]
    if hidden:
        parts += [
            "Not reported, because the uncompressed model is at its floor: "
            + ", ".join(map(_hidden, [(name, table["tasks"][name]) for name in hidden]))
            + ".",
            "",
        ]
    parts += [table["rule"], "", *_backends(table), ""]
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    parts += [f"Peak memory {table['peak_mib']} MiB (largest process), {table['seconds']} s of measuring. {versions}."]
    return "\n".join(parts) + "\n"


def _held(table: dict[str, Any]) -> str:
    """What methods hold while they read, of the methods that are in the table."""
    names = {row["method"] for row in table["rows"]}
    whole = sorted(name for name in names if "hold=all" in name)
    text = "Ours never hold more than a capacity that is fixed when they are built"
    if whole:
        text += f" ({', '.join(whole)}: everything, until the context is read)"
    if any(name.startswith("kvpress/") for name in names):
        text += "; the presses of kvpress hold the full cache until the context is read"
    if any(name.startswith("dynsplit-select") for name in names):
        text += ". dynsplit-select keeps everything: of it, `kept` is what a step attends to"
    return f"{text}."


def _hidden(item: tuple[str, dict[str, Any]]) -> str:
    name, task = item
    if "headroom" not in task:
        return f"{name} (ends not measured)"
    room = task["headroom"]
    return f"{name} ({room['by']}: {room['mean']:.3g} [{room['low']:.3g}, {room['high']:.3g}] above)"


def _table(
    table: dict[str, Any], rows: list[dict[str, Any]], reported: list[str], ranks: dict[str, float]
) -> list[str]:
    tasks = table["tasks"]
    arrows = {name: "↑" if tasks[name]["higher_is_better"] else "↓" for name in reported}
    lines = [
        "| method | kept | mean rank | " + " | ".join(f"{name} {arrows[name]}" for name in reported) + " |",
        "|---|--:|--:|" + "--:|" * len(reported),
        "| full cache | 100 % | – | " + " | ".join(_cell(tasks[name]["full"]) for name in reported) + " |",
    ]
    for row in rows:
        rank = ranks.get(row["method"])
        cells = (_cell(row["tasks"][name]) if name in row["tasks"] else "" for name in reported)
        mark = " ‡" if row["over"] else ""
        lines.append(
            f"| {row['method']} | {row['kept_share']:.1%}{mark} | {'' if rank is None else f'{rank:.2f}'} | "
            + " | ".join(cells)
            + " |"
        )
    lines.append("| no context | 0 % | – | " + " | ".join(_cell(tasks[name]["no_context"]) for name in reported) + " |")
    units = "; ".join(f"{name}: {tasks[name]['unit']}" for name in reported)
    over = "‡ keeps more bytes than the budget allows. " if any(row["over"] for row in rows) else ""
    return [*lines, "", f"{over}{units}."]


def _cell(score: dict[str, Any]) -> str:
    return f"{_number(score['mean'])} [{_number(score['low'])}, {_number(score['high'])}]"


def _number(value: float) -> str:
    """Three digits that matter, without an exponent."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"


def _backends(table: dict[str, Any]) -> list[str]:
    """Which attention each method ran on."""
    by: dict[str, list[str]] = {}
    for row in table["rows"]:
        names = by.setdefault(row["backend"], [])
        if row["method"] not in names:
            names.append(row["method"])
    return [f"Attention by {backend}: {', '.join(names)}.  " for backend, names in by.items()]

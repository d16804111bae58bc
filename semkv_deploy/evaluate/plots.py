"""Pictures of a table: quality against kept bytes, a panel a task; and every task at one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(table: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `quality.png` and `tasks.png`; returns their paths, none where no task is reported. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    reported = [name for name, task in table["tasks"].items() if task["reported"]]
    if not reported or not table["rows"]:
        return []
    return [_quality(table, reported, folder / "quality.png"), _tasks(table, reported, folder / "tasks.png")]


def _colours(table: dict[str, Any]) -> dict[str, Any]:
    """A colour for each method, the same in both pictures."""
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(row["method"] for row in table["rows"]))
    palette = plt.get_cmap("tab20")
    return {method: palette(number % 20) for number, method in enumerate(methods)}


def _quality(table: dict[str, Any], reported: list[str], path: Path) -> Path:
    """A panel for each task: the metric against the share of bytes kept, with intervals, and the ends of the scale."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(reported), figsize=(1.5 + 3.6 * len(reported), 4.2), squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels[0], reported, strict=True):
        task = table["tasks"][name]
        for method, colour in _colours(table).items():
            rows = [row for row in table["rows"] if row["method"] == method and name in row["tasks"]]
            rows.sort(key=lambda row: row["kept_share"])
            scores = [row["tasks"][name] for row in rows]
            means = [score["mean"] for score in scores]
            spread = [[s["mean"] - s["low"] for s in scores], [s["high"] - s["mean"] for s in scores]]
            # Peers are dashed.
            style = "--" if method.startswith("kvpress/") else "-"
            panel.errorbar(
                [row["kept_share"] * 100 for row in rows], means, spread, label=method, color=colour,
                linestyle=style, marker="o", markersize=4, capsize=2, linewidth=1.2,
            )  # fmt: skip
        panel.axhline(task["full"]["mean"], color="black", linewidth=0.8, label="full cache")
        panel.axhline(task["no_context"]["mean"], color="grey", linewidth=0.8, linestyle=":", label="no context")
        panel.set_title(f"{name} {'↑' if task['higher_is_better'] else '↓'}", fontsize=10)
        panel.set_xlabel("kept, % of the full cache's bytes")
        panel.set_ylabel(task["unit"], fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        f"{table['model']}, {table['context']} tokens; compressed before the question is known", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _tasks(table: dict[str, Any], reported: list[str], path: Path) -> Path:
    """Bars by task at each budget: how far from no context (0) to the full cache (1) each method is."""
    import matplotlib.pyplot as plt

    budgets = sorted({row["budget"] for row in table["rows"]}, reverse=True)
    figure, panels = plt.subplots(
        len(budgets), 1, figsize=(2 + 2.2 * len(reported), 3 * len(budgets)), squeeze=False, layout="constrained"
    )
    colours = _colours(table)
    width = 0.8 / len(colours)
    for panel, budget in zip(panels[:, 0], budgets, strict=True):
        rows = [row for row in table["rows"] if row["budget"] == budget]
        for number, row in enumerate(rows):
            heights = [_recovered(table["tasks"][name], row["tasks"].get(name)) for name in reported]
            places = [at + (number - len(rows) / 2) * width for at in range(len(reported))]
            panel.bar(places, heights, width, label=row["method"], color=colours[row["method"]])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(reported)), reported)
        panel.set_ylim(0, 1.1)
        panel.set_ylabel("no context 0, full cache 1")
        panel.set_title(f"{budget:.0%} kept", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _recovered(task: dict[str, Any], score: dict[str, Any] | None) -> float:
    """Where a mean lies between no context and the full cache; 0 where it is worse than no context."""
    if score is None:
        return 0.0
    low, high = task["no_context"]["mean"], task["full"]["mean"]
    return max(0.0, float((score["mean"] - low) / (high - low)))

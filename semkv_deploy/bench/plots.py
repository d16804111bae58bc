"""One picture of a run: bars of time and memory, and a line for each subject over whatever was varied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from semkv_deploy.errors import SemkvError

Cell = dict[str, Any]

FORMATS = (".png", ".pdf", ".svg")
"""Of pictures, by the file's name."""


def check(path: Path) -> None:
    """Fails unless a picture can be written: a measurement takes long, and what it gives would be lost.

    Raises:
        SemkvError: when matplotlib is missing, the directory is, or the name says no format.
    """
    if find_spec("matplotlib") is None:
        raise SemkvError(
            "matplotlib is not installed", where="--plot", fix="install it with: pip install 'semkv-deploy[bench]'"
        )
    if path.suffix not in FORMATS:
        raise SemkvError(
            "not the name of a picture", where="--plot", expected=f"one that ends with {', '.join(FORMATS)}", got=path
        )
    if not path.absolute().parent.is_dir():
        raise SemkvError("no such directory", where="--plot", got=path.parent, fix="make it first")


def draw(output: dict[str, Any], path: Path) -> list[str]:
    """Writes the picture of what `report.run` returned. Needs matplotlib.

    Returns:
        The panels' titles: bars of time a token and of memory, of the largest context and smallest batch; TPOT against
        tokens seen, where there are turns; TPOT and TTFT against context and tokens a second against batch, where there
        are several.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = output["cells"]
    contexts, batches = ({cell[key] for cell in cells} for key in ("context", "batch"))
    at = [cell for cell in cells if cell["context"] == max(contexts) and cell["batch"] == min(batches)]
    # Beside the weights is what a budget is for; of most peers only the whole process is known.
    memory = ("process_mib", "most of the process, MiB")
    if all("peak_mib" in cell for cell in at):
        memory = ("peak_mib", "most beside the weights, MiB")
    panels: list[tuple[str, Callable[[Any, dict[str, Any]], None]]] = [
        ("time a token", lambda panel, colours: _bars(panel, at, colours, "tpot_ms", "TPOT, ms")),
        ("memory", lambda panel, colours: _bars(panel, at, colours, *memory)),
    ]
    if output["turns"] > 1:
        panels.append(("a conversation", lambda panel, colours: _turns(panel, at, colours)))
    if len(contexts) > 1:
        line = [cell for cell in cells if cell["batch"] == min(batches)]
        labels = ("tokens of context", "TPOT, ms")
        panels.append(("time a token by context", lambda p, c: _lines(p, line, c, "context", "tpot_ms", labels)))
        first = ("tokens of context", "TTFT, s")
        panels.append(("first token by context", lambda p, c: _lines(p, line, c, "context", "ttft_s", first)))
    if len(batches) > 1:
        rows = [cell for cell in cells if cell["context"] == max(contexts)]
        rate = ("rows", "tokens/s")
        panels.append(("throughput by batch", lambda p, c: _lines(p, rows, c, "batch", "tokens_per_s", rate)))
    lines_high, bars_high = 3.6, 1.4 + 0.4 * len(at)
    more = -(-(len(panels) - 2) // 2)
    figure, axes = plt.subplots(
        1 + more, 2, figsize=(11, bars_high + lines_high * more), squeeze=False, layout="constrained",
        height_ratios=[bars_high, *[lines_high] * more],
    )  # fmt: skip
    names = list(dict.fromkeys(cell["name"] for cell in cells))
    colours = _colours(names, {cell["name"] for cell in cells if cell["budget"] is None})
    for panel, (title, fill) in zip(axes.flat, panels, strict=False):
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        fill(panel, colours)
    axes[0][1].set_yticklabels([])
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    if more:
        axes[1][0].legend(fontsize=7)
    place = f"{max(contexts)} tokens of context" + (f", {min(batches)} rows" if min(batches) > 1 else "")
    figure.suptitle(
        f"{', '.join(output['bundles'])}: bars at {place}; threads of each: {output['threads']}", fontsize=11
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [title for title, _ in panels]


def _colours(names: Sequence[str], peers: set[str]) -> dict[str, Any]:
    """Ours from dark blue to light green, peers from dark to light grey."""
    import matplotlib.pyplot as plt

    ours = [name for name in names if name not in peers]
    theirs = [name for name in names if name in peers]
    return {
        name: plt.get_cmap(palette)(0.95 - 0.5 * number / max(1, len(own) - 1))
        for palette, own in (("GnBu", ours), ("Greys", theirs))
        for number, name in enumerate(own)
    }


def _bars(panel: Any, cells: Sequence[Cell], colours: dict[str, Any], key: str, label: str) -> None:
    """A bar a cell, with the range of its rounds where it has one."""
    places = range(len(cells))
    spreads = [cell[key] if isinstance(cell[key], dict) else {"median": cell[key]} for cell in cells]
    values = [spread["median"] for spread in spreads]
    ranges = [
        [spread["median"] - spread.get("min", spread["median"]) for spread in spreads],
        [spread.get("max", spread["median"]) - spread["median"] for spread in spreads],
    ]
    highest = max(value + more for value, more in zip(values, ranges[1], strict=True))
    bars = panel.barh(places, values, color=[colours[cell["name"]] for cell in cells], xerr=ranges, ecolor="black")
    panel.bar_label(bars, [f"{value:.4g}" for value in values], padding=4, fontsize=8)
    panel.set_yticks(places, [cell["name"] for cell in cells], fontsize=8)
    panel.set_ylim(len(cells) - 0.5, -0.5)
    panel.set_xlim(0, highest * 1.2 or 1)
    panel.set_xlabel(label, fontsize=8)


def _turns(panel: Any, cells: Sequence[Cell], colours: dict[str, Any]) -> None:
    """Time a token of each turn's reply against the tokens seen by its end."""
    for cell in cells:
        seen = [turn["seen"] for turn in cell["turns"]]
        times = [turn["tpot_ms"] for turn in cell["turns"]]
        panel.plot(seen, times, label=cell["name"], color=colours[cell["name"]], **_style(cell))
    panel.set_xlabel("tokens seen", fontsize=8)
    panel.set_ylabel("TPOT, ms", fontsize=8)
    panel.set_ylim(bottom=0)


def _lines(
    panel: Any, cells: Sequence[Cell], colours: dict[str, Any], over: str, key: str, labels: tuple[str, str]
) -> None:
    """A line for each subject, with the range of its rounds."""
    for name in dict.fromkeys(cell["name"] for cell in cells):
        own = [cell for cell in cells if cell["name"] == name]
        medians = [cell[key]["median"] for cell in own]
        ranges = [
            [cell[key]["median"] - cell[key]["min"] for cell in own],
            [cell[key]["max"] - cell[key]["median"] for cell in own],
        ]
        places = [cell[over] for cell in own]
        panel.errorbar(
            places, medians, ranges, label=name, color=colours[name], marker="o", capsize=2, **_style(own[0])
        )
    panel.set_xlabel(labels[0], fontsize=8)
    panel.set_ylabel(labels[1], fontsize=8)
    panel.set_ylim(bottom=0)


def _style(cell: Cell) -> dict[str, Any]:
    """Peers are dashed."""
    return {"linestyle": "--" if cell["budget"] is None else "-", "markersize": 3, "linewidth": 1.4}

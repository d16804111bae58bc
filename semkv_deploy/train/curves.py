"""A picture of a run's log: losses by step, and KL on held-out dialogues."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

SPAN = 20
"""Steps that a line is smoothed over."""


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries of steps, and of measurements on held-out dialogues."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [entry for entry in entries if "stage" in entry]
    return steps, [entry for entry in entries if "held_out" in entry]


def draw(log: Path, out: Path, title: str) -> None:
    """Writes the picture as PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, held_out = read_log(log)
    names = [name for name in ("kd", "ce", "attn", "rec", "reg", "match") if any(name in entry for entry in steps)]
    figure, panels = plt.subplots(1, len(names) + 1, figsize=(3.8 * (len(names) + 1), 3.4), layout="constrained")
    for panel, name in zip(panels, names, strict=False):
        having = [entry for entry in steps if name in entry]
        values = [entry[name] for entry in having]
        at = [entry["step"] for entry in having]
        panel.plot(at, values, ".", markersize=2, alpha=0.3, color="tab:blue")
        panel.plot(at, _smoothed(values), color="tab:blue", label="train")
        panel.set_title(f"{name} (mean of {SPAN} steps)", fontsize=9)
    for share in held_out[0]["held_out"] if held_out else ():
        at = [entry["step"] for entry in held_out]
        panels[-1].plot(at, [entry["held_out"][share] for entry in held_out], marker=".", label=f"kept {share}")
    panels[-1].set_title("KL on held-out dialogues, nats", fontsize=9)
    panels[-1].legend(fontsize=8)
    for panel in panels:
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        _mark_stages(panel, steps)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _smoothed(values: list[float]) -> list[float]:
    """Mean of each value and those before it, `SPAN` of them at most."""
    return [sum(values[max(0, at - SPAN + 1) : at + 1]) / min(SPAN, at + 1) for at in range(len(values))]


def _mark_stages(panel: Any, steps: list[dict[str, Any]]) -> None:
    for before, after in itertools.pairwise(steps):
        if before["stage"] != after["stage"]:
            panel.axvline(after["step"], color="grey", linewidth=0.6, linestyle=":")

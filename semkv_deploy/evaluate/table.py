"""Cells to a table: means with intervals, paired against the full cache, ranks, and tasks that are not reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from semkv_deploy.evaluate.entries import FULL, NO_CONTEXT
from semkv_deploy.evaluate.metrics import estimate, mean_ranks, paired
from semkv_deploy.evaluate.tasks import TASKS

RULE = (
    "A task is reported where the uncompressed model is above its floor: the 95 % bootstrap interval of full cache "
    "minus no context, paired over examples, excludes 0."
)


def tabulate(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Everything the reports show, as plain data.

    Returns:
        tasks: by name: metric, unit, reported, headroom (full minus no context), full, no_context.
        rows: method, budget, kept_share, backends, and by task: mean, low, high, and the paired difference to the full
            cache with its interval.
        mean_rank: by budget, by method, over the tasks that are reported.
    """
    all_cells = list(cells)
    tasks = {name: _task(name, all_cells) for name in dict.fromkeys(cell["task"] for cell in all_cells)}
    rows: dict[tuple[float, str], dict[str, Any]] = {}
    for cell in all_cells:
        if cell["method"] in (FULL, NO_CONTEXT):
            continue
        row = rows.setdefault(
            (cell["budget"], cell["method"]),
            {"method": cell["method"], "budget": cell["budget"], "kept": [], "over": False, "tasks": {}},
        )
        row["backend"] = cell["backend"]
        row["kept"] += _values(cell, "kept_share")
        row["over"] |= any(each["kept_bytes"] > each["allowed_bytes"] for each in cell["rows"])
        row["tasks"][cell["task"]] = _score(cell, all_cells)
    for row in rows.values():
        shares = row.pop("kept")
        row["kept_share"] = sum(shares) / len(shares)
    reported = [name for name, task in tasks.items() if task["reported"]]
    ranks = {}
    for budget in sorted({row["budget"] for row in rows.values()}):
        scores = {
            name: {
                row["method"]: row["tasks"][name]["mean"]
                for row in rows.values()
                if row["budget"] == budget and name in row["tasks"]
            }
            for name in reported
        }
        ranks[f"{budget:g}"] = mean_ranks(scores, {name: TASKS[name].higher_is_better for name in reported})
    facts = all_cells[0]["facts"]
    return {
        "model": facts["model"],
        "context": facts["context"],
        "examples": facts["examples"],
        "seed": facts["seed"],
        "versions": facts["versions"],
        "peak_mib": max(cell["peak_mib"] for cell in all_cells),
        "seconds": round(sum(sum(_values(cell, "seconds")) for cell in all_cells)),
        "rule": RULE,
        "tasks": tasks,
        "rows": [rows[key] for key in sorted(rows, key=lambda key: (-key[0], _order(key, rows, ranks)))],
        "mean_rank": ranks,
    }


def _order(key: tuple[float, str], rows: dict[tuple[float, str], Any], ranks: dict[str, dict[str, float]]) -> float:
    return ranks.get(f"{key[0]:g}", {}).get(key[1], len(rows) + 1)


def _values(cell: dict[str, Any], name: str) -> list[float]:
    return [each[name] for each in cell["rows"]]


def _find(cells: Sequence[dict[str, Any]], task: str, method: str) -> dict[str, Any] | None:
    return next((cell for cell in cells if cell["task"] == task and cell["method"] == method), None)


def _task(name: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A task's ends of the scale, and whether there is room between them."""
    task = TASKS[name]
    found: dict[str, Any] = {"metric": task.metric, "unit": task.unit, "higher_is_better": task.higher_is_better}
    full, none = _find(cells, name, FULL), _find(cells, name, NO_CONTEXT)
    if full is None or none is None:
        return {**found, "reported": False}
    first, second = _values(full, task.headroom), _values(none, task.headroom)
    room = paired(first, second) if task.headroom_higher else paired(second, first)
    return {
        **found,
        "full": estimate(_values(full, task.metric))._asdict(),
        "no_context": estimate(_values(none, task.metric))._asdict(),
        "headroom": {"by": task.headroom, **room._asdict()},
        "reported": len(first) > 1 and room.low > 0,
    }


def _score(cell: dict[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A cell's mean and interval, its difference to the full cache, and means of what else was measured."""
    task = TASKS[cell["task"]]
    values = _values(cell, task.metric)
    score: dict[str, Any] = estimate(values)._asdict()
    full = _find(cells, cell["task"], FULL)
    if full is not None:
        score["to_full"] = paired(values, _values(full, task.metric))._asdict()
    for name in ("perplexity",):
        if name in cell["rows"][0]:
            score[name] = sum(_values(cell, name)) / len(values)
    score["read_s"] = sum(_values(cell, "read_s")) / len(values)
    return score

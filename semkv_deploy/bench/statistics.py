"""Medians with their extremes over rounds, and ratios of what was measured in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`median`, `min` and `max` of a value over rounds, and `all` of them in their order."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """How many times the one is the other, round by round: a disturbance that lasts hits both of a pair."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def ratios(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Budget 1 of each bundle over its smaller budgets, and each peer over each of ours, at equal context and batch.

    Returns:
        For each pair and value: what (`tpot`, `ttft`, `all turns`, `peak memory`), over and under (names), context,
        batch, and the spread. `peak memory` is that beside the weights, of pairs of which both are known.
    """
    found = []
    for under in cells:
        if under["budget"] is None:
            continue
        for over in cells:
            same_place = (over["context"], over["batch"]) == (under["context"], under["batch"])
            whole = over["bundle"] == under["bundle"] and over["budget"] == 1 and over is not under
            if not same_place or not (over["budget"] is None or whole):
                continue
            pair = {"over": over["name"], "under": under["name"]}
            place = {"context": under["context"], "batch": under["batch"]}
            for what, value in _pairs(over, under).items():
                found.append({"what": what, **pair, **place, **value})
    return found


def _pairs(over: dict[str, Any], under: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ratios of two cells by what they are of."""
    found = {"tpot": ratio(over["tpot_ms"]["all"], under["tpot_ms"]["all"])}
    if len(over["turns"]) > 1:
        found["all turns"] = ratio([over["total_s"]], [under["total_s"]])
    else:
        found["ttft"] = ratio(over["ttft_s"]["all"], under["ttft_s"]["all"])
    if "peak_mib" in over and under.get("peak_mib"):
        found["peak memory"] = ratio([over["peak_mib"]], [under["peak_mib"]])
    return found

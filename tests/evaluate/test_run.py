"""The evaluation is right at its ends, gives the same twice, and goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy import open_session
from semkv_deploy.evaluate.bundles import built
from semkv_deploy.evaluate.entries import Entry
from semkv_deploy.evaluate.run import Plan, evaluate
from semkv_deploy.evaluate.table import tabulate
from semkv_deploy.evaluate.tasks.continuation import Continuation
from semkv_deploy.targets.onnxruntime import native

PlanAt = Callable[..., Plan]
NEAR_FULL = 0.99
"""A budget whose capacity holds the context: a method that keeps everything needs no more."""

STREAMING = [Entry("streaming-llm", "streaming-llm")]


def numbers(cells: list[dict[str, Any]]) -> list[Any]:
    """What cells say, without how long it took."""
    timed = ("seconds", "read_s")
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in cell["rows"]] for cell in cells]
    return [(cell["method"], cell["budget"], cell["task"], of) for cell, of in zip(cells, rows, strict=True)]


@pytest.fixture(scope="module")
def at_the_ends(plan_at: PlanAt, ends: list[Entry], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    out = tmp_path_factory.mktemp("ends")
    plan = plan_at(out, ends, ("prose", "agreement", "passkey", "facts"), budgets=[NEAR_FULL])
    return {(cell["method"], cell["task"]): cell["rows"] for cell in evaluate(plan)}


def test_a_method_that_returns_the_full_cache_scores_as_full(at_the_ends: dict[Any, Any]):
    for task, metrics in (("prose", ("kl", "nll")), ("agreement", ("tokens",)), ("passkey", ("recall",))):
        for mine, full in zip(at_the_ends["keeper", task], at_the_ends["full", task], strict=True):
            assert [mine[name] for name in metrics] == pytest.approx([full[name] for name in metrics], abs=1e-6)
            assert mine["kept_bytes"] == full["kept_bytes"] and mine["kept_share"] == 1
    assert all(row["kl"] == 0 for row in at_the_ends["full", "prose"])
    assert [row["tokens"] for row in at_the_ends["full", "agreement"]] == [64, 64]


def test_a_method_that_deletes_everything_scores_at_the_floor(at_the_ends: dict[Any, Any]):
    for task, metrics in (("prose", ("kl", "nll")), ("agreement", ("tokens",)), ("facts", ("recall",))):
        for mine, floor in zip(at_the_ends["forgetter", task], at_the_ends["no context", task], strict=True):
            assert [mine[name] for name in metrics] == pytest.approx([floor[name] for name in metrics], rel=1e-3)
            assert mine["kept_bytes"] == floor["kept_bytes"] == 0
    floor, full = at_the_ends["no context", "prose"], at_the_ends["full", "prose"]
    assert all(mine["kl"] > 0.1 > full_row["kl"] for mine, full_row in zip(floor, full, strict=True))


def test_two_runs_agree_and_a_compressed_cache_is_within_its_allowance(plan_at: PlanAt, tmp_path: Path):
    runs = [numbers(list(evaluate(plan_at(tmp_path / name, STREAMING, ("prose",))))) for name in "ab"]
    assert runs[0] == runs[1]
    rows = runs[0][-1][-1]
    assert all(0.45 < row["kept_share"] <= 0.51 and row["kept_bytes"] <= row["allowed_bytes"] for row in rows)
    assert all(row["kl"] > 0 for row in rows)


def test_what_is_read_in_a_cache_that_holds_everything_is_measured_in_one_of_the_budget(
    plan_at: PlanAt, tmp_path: Path
):
    held = Entry("streaming-llm:hold=all", "streaming-llm", {"hold": "all"})
    *_, budgets, alls = numbers(list(evaluate(plan_at(tmp_path, [*STREAMING, held], ("prose",)))))
    for mine, other in zip(alls[-1], budgets[-1], strict=True):
        assert mine["kept_bytes"] == other["kept_bytes"] <= mine["allowed_bytes"]
        # The same slots, but what stands in them was computed from a context that was whole.
        assert mine["kl"] > 0 and mine["kl"] != other["kl"]


def test_caches_of_another_type_are_counted_in_their_own_bytes(
    plan_at: PlanAt, tmp_path: Path, native_library: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(native, "LIBRARY", native_library)
    held = Entry("streaming-llm:cache_dtype=int8", "streaming-llm", {"cache_dtype": "int8"})
    *_, plain, coded = list(evaluate(plan_at(tmp_path, [*STREAMING, held], ("prose",))))
    assert coded["backend"] == "onnxruntime native NexusAttention, int8"
    for mine, other in zip(coded["rows"], plain["rows"], strict=True):
        # Heads of 16: 16 codes and a scale of 4 bytes, to 16 floats.
        assert mine["kept_bytes"] * 64 == other["kept_bytes"] * 20
        assert mine["kept_share"] == pytest.approx(other["kept_share"] * 20 / 64)
        assert mine["kl"] != other["kl"] and mine["kl"] == pytest.approx(other["kl"], rel=0.02)


def test_a_budget_is_what_steps_attend_to_where_everything_stays(plan_at: PlanAt, tmp_path: Path):
    """Prompts attend to all either way, so what is followed goes in steps: else nothing would be lost."""
    chooses = Entry("dynsplit-select:blocks=delimiters", "dynsplit-select", {"blocks": "delimiters"})
    *_, most, half = list(evaluate(plan_at(tmp_path, [chooses], ("prose",), budgets=[1.0, 0.5])))
    for all_of_it, part in zip(most["rows"], half["rows"], strict=True):
        assert all_of_it["kept_share"] == 1 and 0.5 <= part["kept_share"] <= 0.51
        assert 0 <= all_of_it["kl"] < part["kl"] and part["kl"] > 1e-4
        assert part["kept_bytes"] <= part["allowed_bytes"]


def test_a_calibration_text_of_ones_own(plan_at: PlanAt, tmp_path: Path, corpus: Path):
    def calibrated(text: str) -> Any:
        entry = Entry("importance", "importance", {"queries": "predicted", "calibration_text": text})
        with built(entry, decoder, [0.5], 256, tmp_path, lambda what, share: None) as bundle:
            return open_session(bundle, budget=0.5).contract.behaviours

    decoder = Path(plan_at(tmp_path, [], ("prose",)).source)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{number} is {number * number};" for number in range(400)), encoding="utf-8")
    assert calibrated(str(other)) != calibrated(str(corpus)) == calibrated(str(corpus))


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(
    plan_at: PlanAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_at(tmp_path / "whole", STREAMING, ("prose",))
    whole = numbers(list(evaluate(plan)))
    broken = plan_at(tmp_path / "broken", STREAMING, ("prose",))
    calls: list[int] = []
    measure = Continuation.measure

    def counted(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(Continuation, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        list(evaluate(broken))
    # The full cache's cell of two examples is there; the one that was begun is not.
    assert len(list((tmp_path / "broken" / "cells").glob("*.json"))) == 1
    assert numbers(list(evaluate(broken))) == whole
    assert len(calls) == 4 + 4
    assert numbers(list(evaluate(broken))) == whole and len(calls) == 4 + 4
    assert list((tmp_path / "broken" / "work").iterdir()) == [], "bundles go when they were measured"


def test_what_decides_a_cell_is_in_its_name(plan_at: PlanAt, tmp_path: Path, corpus: Path):
    from semkv_deploy.evaluate.run import plan_cells, prepare
    from semkv_deploy.evaluate.store import Store

    def names(**changes: Any) -> set[str]:
        methods = changes.pop("methods", STREAMING)
        plan = plan_at(tmp_path, methods, ("prose",), **changes)
        cells = plan_cells(plan, prepare(plan, Store(tmp_path), lambda what, share: None))
        return {cell.name for cell in cells if cell.entry is methods[0]}

    alone = [
        names(),
        names(seed=1),
        names(context=128),
        names(examples=3),
        names(budgets=[0.25]),
        names(methods=[Entry("streaming-llm:sinks=8", "streaming-llm", {"sinks": 8})]),
        names(methods=[Entry("streaming-llm:t", "streaming-llm", {"calibration_text": str(corpus)})]),
        names(methods=[Entry("streaming-llm:groups=head", "streaming-llm", {"groups": "head"})]),
    ]
    assert len(set.union(*alone)) == len(alone) and names() == alone[0]


def test_a_damaged_cell_is_measured_again(plan_at: PlanAt, tmp_path: Path):
    plan = plan_at(tmp_path, [], ("prose",))
    first = numbers(list(evaluate(plan)))
    for path in (tmp_path / "cells").glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert numbers(list(evaluate(plan))) == first


def test_the_table_hides_tasks_without_headroom(at_the_ends: dict[Any, Any], plan_at: PlanAt, tmp_path: Path):
    """The tiny random model recalls nothing: there is nothing to lose, and nothing to report."""
    cells = list(evaluate(plan_at(tmp_path, STREAMING, ("passkey",))))
    table = tabulate(cells)
    assert not table["tasks"]["passkey"]["reported"] and table["mean_rank"] == {"0.5": {}}
    from semkv_deploy.evaluate.report import markdown

    page = markdown(table)
    assert "Not reported, because the uncompressed model is at its floor: passkey" in page
    assert "compressed before the question is known" in page and "GroupQueryAttention" in page

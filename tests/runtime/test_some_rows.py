"""A step runs the rows from the first to the last that is active: to the bit what a step of all rows gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.runtime.open import open_session
from semkv_deploy.targets.onnxruntime.engine import MOST_STEPS, OnnxRuntimeEngine
from tests.tiny import with_adapter

from ..methods.matrix import FORMS
from .test_rows import same, snapshot, text

ACTIVE = ["0001", "1000", "0110", "1010", "0101", "1111", "0010", "1100", "0011", "1001", "0100", "0111"]
"""More spans than bindings are held."""


class Whole:
    """An engine that only runs all rows."""

    def __init__(self, inner: OnnxRuntimeEngine) -> None:
        self.opened, self.batch, self.contract, self.run = inner.opened, inner.batch, inner.contract, inner.run
        self.read, self.write, self.reset, self.run_groups = inner.read, inner.write, inner.reset, inner.run_groups


def sessions(bundle: Bundle, **options: Any) -> tuple[Any, Any, list[int]]:
    """One that leaves idle rows out, one that does not, and how many rows each step of the first one ran."""
    from semkv_deploy.runtime.session import Session

    some, ran = open_session(bundle, batch=4, threads=1, **options), []
    inner = some.engine.run_rows

    def counted(program: str, feeds: Any, first: int) -> Any:
        ran.append(len(feeds["input_ids"]))
        return inner(program, feeds, first)

    some.engine.run_rows = counted
    return some, Session(Whole(open_session(bundle, batch=4, threads=1, **options).engine)), ran  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["semanticache", "importance", "sonic", "dynsplit", "dynsplit-select"])
def test_to_the_bit(name: str, tiny_export: Path, tmp_path: Path):
    """Past the capacity, for a method of each behaviour; what a row that is left out holds stays."""
    method = with_adapter(FORMS[name], tiny_export)
    decoder = str(tiny_export / "decoder.onnx")
    bundle = build_bundle(decoder, tmp_path / "b", method=method, budgets=[0.5], weights="fp32", native="off")
    some, whole, ran = sessions(bundle)
    for turn in range(2):
        prompts = [text(10 * turn + row, 60 + 20 * row) for row in range(4)]
        np.testing.assert_array_equal(some.prefill(prompts), whole.prefill(prompts))
        for number, wanted in enumerate(ACTIVE):
            active = np.array([each == "1" for each in wanted])
            ids = np.array([7 + number + row for row in range(4)])
            idle = [name for name in snapshot(some) if not name[-1].isdigit() or not active[int(name[-1])]]
            before = snapshot(some)
            ours, theirs = some.step(ids, active).copy(), whole.step(ids, active)
            np.testing.assert_array_equal(ours[active], theirs[active])
            after = snapshot(some)
            assert same({key: before[key] for key in idle if key[-1].isdigit()}, after)
        some.end_turn()
        whole.end_turn()
        assert same(snapshot(some), snapshot(whole))
    spans = [len(wanted.strip("0")) for wanted in ACTIVE]
    assert ran == 2 * spans and some.stats.runs == whole.stats.runs
    assert len(some.engine._steps) <= MOST_STEPS < len(set(ACTIVE))


def test_quantised_weights(tiny_export: Path, tmp_path: Path):
    """Four bits a weight, by the same kernels whatever the number of rows."""
    decoder = str(tiny_export / "decoder.onnx")
    bundle = build_bundle(decoder, tmp_path / "b", method=FORMS["semanticache"], budgets=[0.5], weights="int4")
    some, whole, _ = sessions(bundle)
    prompts = [text(row, 40) for row in range(4)]
    np.testing.assert_array_equal(some.prefill(prompts), whole.prefill(prompts))
    for wanted in ACTIVE:
        active = np.array([each == "1" for each in wanted])
        np.testing.assert_array_equal(some.step([5, 6, 7, 8], active)[active], whole.step([5, 6, 7, 8], active)[active])


def test_an_idle_row_between_others_has_no_dead_slot(tiny_bundle: Path):
    """Then the others are run one by one; at an end it is left out, and its cache is full all the same."""
    for wanted, alone in (("0111", 0), ("1011", 3)):
        some, whole, ran = sessions(Bundle.open(tiny_bundle), budget=0.25)
        full = wanted.index("0")
        prompts = [text(row, some.contract.capacity if row == full else 20) for row in range(4)]
        np.testing.assert_array_equal(some.prefill(prompts), whole.prefill(prompts))
        active = np.array([each == "1" for each in wanted])
        some.engine.run = counting = Counting(some.engine.run)
        np.testing.assert_array_equal(some.step([5, 6, 7, 8], active)[active], whole.step([5, 6, 7, 8], active)[active])
        assert counting.calls == alone and ran == ([] if alone else [3])
        assert same(snapshot(some), snapshot(whole))


class Counting:
    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        return self.inner(*arguments, **named)

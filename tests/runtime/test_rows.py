"""Rows are independent: idle and finished ones need no room and lose nothing, refused calls leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Importance, StreamingLLM
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


AT_TURNS = StreamingLLM(compress_at="turn")
ISOLATED = StreamingLLM(turns="isolated")


@pytest.fixture(scope="module")
def bundles(bundle: Bundle, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Merging when the cache is full; evicting at turns' ends; reading again and evicting; evicting inside turns."""
    out = tmp_path_factory.mktemp("bundles")
    options: dict[str, Any] = {"budgets": [0.25, 0.5, 1.0], "weights": "fp32", "max_context": 512}
    built = [
        build_bundle(tiny_export / "decoder.onnx", out / name, method=method, **options)
        for name, method in (("at_turns", AT_TURNS), ("importance", Importance(fit="none")), ("isolated", ISOLATED))
    ]
    return [bundle, *built]


def text(seed: int, count: int) -> list[int]:
    random = np.random.default_rng(seed)
    words = [random.integers(2, 512, 3) for _ in range(6)]
    return np.concatenate([words[i] for i in random.integers(0, 6, count + 1)])[:count].tolist()


def snapshot(session: Session) -> dict[str, Any]:
    """Everything a conversation is made of: counters, columns, and buffers as far as slots are live."""
    found: dict[str, Any] = {"position": session.position.copy(), "length": session.length.copy()}
    found["chunks"] = [(each.chunk, each.after_delimiter) for each in session.slots.chunks]
    for group, lengths in enumerate(session.length):
        for row, live in enumerate(lengths):
            for name, columns in session.slots.columns.items():
                found[f"{name}.{group}.{row}"] = columns[group][row, :, :live].copy()
            for name in [buffer.name for buffer in session.contract.cache.buffers]:
                found[f"{name}.{group}.{row}"] = session.engine.read(name, group)[row, :, :live].copy()
    return found


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_an_idle_row_with_a_full_cache_stops_nobody(bundle: Bundle, budget: float):
    """Its token would have no dead slot: the others are run without it, and its slots stay bit for bit."""
    session = open_session(bundle, budget=budget, batch=3)
    capacity = session.contract.capacity
    session.prefill([text(1, capacity), text(2, 20), text(3, 30)])
    assert session.length[0].tolist() == [capacity, 20, 30]
    before, runs = snapshot(session), session.stats.runs
    active = np.array([False, True, True])
    logits = session.step([0, 7, 9], active).copy()
    after = snapshot(session)
    assert session.stats.runs == runs and session.position.tolist() == [capacity, 21, 31]
    assert all(np.array_equal(before[name], after[name]) for name in before if name.endswith(".0"))
    for row, (seed, count, token) in {1: (2, 20, 7), 2: (3, 30, 9)}.items():
        alone = open_session(bundle, budget=budget)
        alone.prefill(text(seed, count))
        np.testing.assert_allclose(logits[row], alone.step([token])[0], atol=1e-4)


def test_a_row_at_the_end_of_its_context_ends_alone(bundle: Bundle):
    prompts = [text(4, 505), text(5, 12), text(6, 100)]
    together = open_session(bundle, budget=1.0, batch=3).generate(prompts, max_new_tokens=30)
    alone = [open_session(bundle, budget=1.0).generate(prompt, max_new_tokens=30)[0] for prompt in prompts]
    assert together == alone and [len(reply) for reply in together] == [7, 30, 30]


def test_a_row_whose_cache_is_full_ends_alone(tiny_export: Path, tmp_path: Path):
    """Nothing compresses it, and there is context left."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import Full

    decoder = str(tiny_export / "decoder.onnx")
    built = build_bundle(decoder, tmp_path / "b", budgets=[0.25], method=Full(), weights="fp32")
    session = open_session(built, batch=2)
    replies = session.generate([text(1, 120), text(2, 10)], max_new_tokens=20)
    assert [len(reply) for reply in replies] == [8, 20] and session.length[0].tolist() == [128, 30]
    with pytest.raises(SemkvError, match=r"row 0, budget 0\.25: the cache is full and the method does not compress"):
        session.step([5, 5])
    assert session.length[0].tolist() == [128, 30]


def test_reset_and_end_turn_of_one_row(bundle: Bundle):
    session = open_session(bundle, budget=0.5, batch=2)
    session.prefill([text(1, 50), text(2, 60)])
    before = snapshot(session)
    session.reset(1)
    assert session.position.tolist() == [50, 0] and session.length[:, 1].tolist() == [0, 0]
    after = snapshot(session)
    assert all(np.array_equal(before[name], after[name]) for name in before if name.endswith(".0"))
    np.testing.assert_array_equal(
        session.prefill([[], text(3, 40)])[1], open_session(bundle, budget=0.5).prefill(text(3, 40))[0]
    )
    session.end_turn(0)
    with pytest.raises(SemkvError, match=r"no such row \(expected 0 to 1, got 2\)"):
        session.end_turn(2)


BAD: dict[str, Any] = {
    "an id past the vocabulary": ([7] * 100 + [512], "no token of the model has this id .*got 512"),
    "a negative id": ([5, -1], "no token of the model has this id .*got -1"),
    "a number with a fraction": ([5.9], "token ids are integers"),
    "words": (["five"], "token ids are integers"),
    "a bool": ([True], "token ids are integers"),
    "more than the context": ([5] * 600, "600 more tokens do not fit the context"),
    "nothing": ([], "nothing to prefill"),
    "too many rows": ([[5], [6]], "wrong number of rows"),
    "lists in a list": ([[[5]]], "one list for each row"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_leaves_no_trace(name: str, bundle: Bundle):
    given_, words = BAD[name]
    session = open_session(bundle, budget=0.5)
    session.prefill(text(1, 60))
    before = snapshot(session)
    with pytest.raises(SemkvError, match=words):
        session.prefill(given_)
    assert same(before, snapshot(session))
    expected = open_session(bundle, budget=0.5)
    expected.prefill(text(1, 60))
    np.testing.assert_array_equal(session.step([5]), expected.step([5]))


class Failing:
    """An engine whose run number `at` fails after it has written, as one that is interrupted does."""

    def __init__(self, engine: Any, at: int, program: str) -> None:
        self.inner, self.left, self.program = engine, at, program
        self.opened, self.batch, self.contract = engine.opened, engine.batch, engine.contract
        self.read, self.write, self.reset, self.cache_bytes = (
            engine.read,
            engine.write,
            engine.reset,
            engine.cache_bytes,
        )

    def _tick(self, program: str) -> None:
        if program == self.program:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def run(self, program: str, feeds: Any, *, row: int | None = None) -> Any:
        outputs = self.inner.run(program, feeds, row=row)
        self._tick(program)
        return outputs

    def run_groups(self, program: str, feeds: Any) -> Any:
        outputs = self.inner.run_groups(program, feeds)
        self._tick(program)
        return outputs


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_before_anything_is_compressed_is_taken_back(at: int, bundle: Bundle):
    inner = open_session(bundle, budget=1.0).engine
    session = Session(Failing(inner, at, "decode"))
    failed = False
    for prompt in (text(1, 60), text(2, 200)):
        before = snapshot(session)
        try:
            session.prefill(prompt)
        except KeyboardInterrupt:
            failed = True
            assert same(before, snapshot(session))
            session.prefill(prompt)
    whole = open_session(bundle, budget=1.0)
    whole.prefill(text(1, 60))
    whole.prefill(text(2, 200))
    assert failed and same(snapshot(whole), snapshot(session))


def test_a_failure_later_is_said_until_the_row_is_reset(bundle: Bundle):
    session = Session(Failing(open_session(bundle, budget=0.25).engine, 6, "decode"))
    with pytest.raises(KeyboardInterrupt):
        session.prefill(text(1, 400))
    with pytest.raises(SemkvError, match=r"an earlier call failed after part of it was appended\. Reset the row"):
        session.prefill(text(1, 5))
    with pytest.raises(SemkvError, match="an earlier call failed"):
        session.save("never")
    session.reset()
    expected = open_session(bundle, budget=0.25).prefill(text(2, 40))
    np.testing.assert_array_equal(session.prefill(text(2, 40)), expected)


def test_a_compression_cut_short_breaks_every_row(bundle: Bundle):
    inner = open_session(bundle, budget=0.25, batch=2).engine
    session = Session(Failing(inner, 1, "compress"))
    session.prefill([text(1, 50), text(2, 120)])
    with pytest.raises(KeyboardInterrupt):
        session.prefill([[], text(3, 60)])
    for row in range(2):
        with pytest.raises(SemkvError, match="an earlier call failed"):
            session.prefill([[5] if row == 0 else [], [5] if row == 1 else []])
    session.reset(0)
    session.prefill([[5, 6], []])


Action = st.one_of(
    st.tuples(st.just("prefill"), st.lists(st.integers(0, 70), min_size=2, max_size=2)),
    st.tuples(st.just("step"), st.lists(st.booleans(), min_size=2, max_size=2)),
    st.tuples(st.just("end"), st.sampled_from([None, 0, 1])),
    st.tuples(st.just("reset"), st.sampled_from([0, 1])),
    st.tuples(st.just("refused"), st.sampled_from([[[512], []], [[-1], [3]], [[5], [6] * 600]])),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(Action, min_size=3, max_size=12),
    seed=st.integers(0, 50),
    budget=st.sampled_from([0.25, 0.5, 1.0]),
    method=st.sampled_from([0, 1, 2, 3]),
)
def test_any_order_of_calls_leaves_rows_as_they_are_alone(
    actions: list[Any], seed: int, budget: float, method: int, bundles: list[Bundle]
):
    """Lengths within capacity; each row's logits, lengths and slots are those of a session with this row only."""
    bundle = bundles[method]
    together = open_session(bundle, budget=budget, batch=2)
    alone = [open_session(bundle, budget=budget) for _ in range(2)]
    for number, (kind, what) in enumerate(actions):
        if kind == "prefill":
            prompts = [text(seed + 2 * number + row, count) for row, count in enumerate(what)]
            fits = [each.position[0] + len(p) <= each.max_context for each, p in zip(alone, prompts, strict=True)]
            if not any(prompts) or not all(fits):
                with pytest.raises(SemkvError):
                    together.prefill(prompts)
                continue
            logits = together.prefill(prompts)
            for row, prompt in enumerate(prompts):
                if prompt:
                    np.testing.assert_allclose(logits[row], alone[row].prefill(prompt)[0], atol=2e-4)
        elif kind == "step":
            active = [on and each.position[0] < each.max_context for on, each in zip(what, alone, strict=True)]
            logits = together.step([3 + seed, 4 + seed], np.array(active)).copy()
            for row in range(2):
                if active[row]:
                    np.testing.assert_allclose(logits[row], alone[row].step([3 + seed + row])[0], atol=2e-4)
        elif kind == "end":
            together.end_turn(what)
            for row in range(2):
                if what in (None, row):
                    alone[row].end_turn()
        elif kind == "reset":
            together.reset(what)
            alone[what].reset()
        else:
            before = snapshot(together)
            with pytest.raises(SemkvError):
                together.prefill(what)
            assert same(before, snapshot(together))
        capacity = np.array([group.capacity for group in together.contract.cache.groups])
        assert (together.length <= capacity[:, None]).all()
        for row in range(2):
            np.testing.assert_array_equal(together.length[:, row], alone[row].length[:, 0])
            for group, live in enumerate(alone[row].length[:, 0]):
                ours, theirs = together.slot_position[group], alone[row].slot_position[group]
                np.testing.assert_array_equal(ours[row, :, :live], theirs[0, :, :live])

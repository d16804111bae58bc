"""Sessions on a tiny bundle: against the reference, and what must hold after every run and every compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.calibrate import mean_kl
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Full, Importance, SemantiCache, StreamingLLM
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session
from semkv_deploy.validate.reference import ReferenceEngine

VOCAB = 512


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32").eval()


def reference_session(bundle: Bundle, model: Any, budget: float, batch: int = 1) -> Session:
    """The session `open_session` gives, on the reference engine."""
    manifest = bundle.manifest
    opened = bundle.built("onnxruntime-cpu", budget)
    return Session(ReferenceEngine(opened, model, facts=manifest.model, method=manifest.method, batch=batch))


def text(seed: int, count: int) -> list[int]:
    """Ids in which words repeat, so that there is something to merge."""
    random = np.random.default_rng(seed)
    words = [random.integers(2, VOCAB, 3) for _ in range(6)]
    return np.concatenate([words[i] for i in random.integers(0, 6, count + 1)])[:count].tolist()


def same_cache(session: Session, reference: Session, atol: float) -> None:
    """Lengths, chosen slots and live cache contents of both sessions agree.

    Heads of one length may have slots that nobody sees (a bias of minus infinity): keys and values there mean nothing.
    """
    np.testing.assert_array_equal(session.length, reference.length)
    np.testing.assert_array_equal(session.position, reference.position)
    for layer, lengths in enumerate(session.length):
        for row, live in enumerate(lengths):
            for ours, theirs in (
                (session.slot_position, reference.slot_position),
                (session.slot_chunk, reference.slot_chunk),
            ):
                np.testing.assert_array_equal(ours[layer][row, :, :live], theirs[layer][row, :, :live])
            biases = (each.engine.read("slot_bias", layer)[row, :, :live] for each in (session, reference))
            seen, theirs_seen = (np.isfinite(bias) for bias in biases)
            np.testing.assert_array_equal(seen, theirs_seen)
            for buffer in session.contract.cache.buffers:
                mine, other = (each.engine.read(buffer.name, layer)[row, :, :live] for each in (session, reference))
                if not buffer.of_slots and buffer.has_slots:
                    mine, other = mine[seen], other[seen]
                # Attention is small where slots are many: a tolerance of keys would hide that none was recorded.
                np.testing.assert_allclose(mine, other, atol=min(atol, 1e-4) if buffer.of_slots else atol)


def test_three_turns_with_compression_match_the_reference(bundle: Bundle, model: Any):
    session, reference = open_session(bundle, budget=0.25), reference_session(bundle, model, 0.25)
    for turn in range(3):
        ids = text(turn, 70)
        logits, expected = session.prefill(ids), reference.prefill(ids)
        np.testing.assert_allclose(logits, expected, atol=2e-3)
        for _ in range(20):
            token = expected.argmax(-1)
            logits, expected = session.step(token), reference.step(token)
            np.testing.assert_allclose(logits, expected, atol=2e-3)
        same_cache(session, reference, atol=2e-3)
    assert session.stats.runs == reference.stats.runs > 1
    assert session.stats.levels == reference.stats.levels


@pytest.mark.parametrize(
    "method",
    [
        StreamingLLM(),
        SemantiCache(cluster_by="head"),
        SemantiCache(merge_keys="cached", ladder="paper", recent=0, sinks=0, threshold=0.6),
        SemantiCache(compress_at="turn"),
        Importance(fit="none"),
        Importance(fit="none", compress_at="turn", sinks=0),
        Importance(queries="predicted"),
    ],
    ids=lambda method: method.model_dump_json(exclude_defaults=True),
)
def test_every_method_built_matches_its_reference(method: Any, tiny_export: Path, model: Any, tmp_path: Path):
    decoder = str(tiny_export / "decoder.onnx")
    built = build_bundle(decoder, tmp_path / "bundle", budgets=[0.25], method=method, weights="fp32")
    session, reference = open_session(built, budget=0.25), reference_session(built, model, 0.25)
    for turn in range(2):
        logits, expected = (each.prefill(text(turn, 110)) for each in (session, reference))
        np.testing.assert_allclose(logits, expected, atol=2e-3)
        session.end_turn()
        reference.end_turn()
    same_cache(session, reference, atol=2e-3)
    assert session.stats.runs == reference.stats.runs >= 1


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_full_method_and_quantised_weights(weights: Any, tiny_export: Path, bundle: Bundle, tmp_path: Path):
    """The full cache takes no slot bias; what is left of the difference to float32 is the weights'."""
    decoder = str(tiny_export / "decoder.onnx")
    built = build_bundle(decoder, tmp_path / "bundle", budgets=[1.0], method=Full(), weights=weights)
    assert list(built.built("onnxruntime-cpu").contract.programs) == ["decode"]
    ids = text(4, 100)
    ours, exact = (open_session(each, budget=1.0).prefill(ids, all_logits=True) for each in (built, bundle))
    cost = mean_kl(exact, ours)
    assert 0 < cost < (2.0 if weights == "int4" else 0.05)
    short = build_bundle(decoder, tmp_path / "short", budgets=[0.25], method=Full(), weights=weights)
    short = open_session(short)
    with pytest.raises(SemkvError, match="the cache is full and the method does not compress"):
        short.prefill([*ids, *ids])
    assert short.position[0] == 0


def test_budget_one_is_the_uncompressed_model(bundle: Bundle, model: Any):
    import torch

    session = open_session(bundle, budget=1.0)
    ids = text(7, 300)
    generated = session.generate(ids, max_new_tokens=40)[0]
    with torch.no_grad():
        full = model(torch.tensor([ids + generated])).logits[0]
    assert full[len(ids) - 1 : -1].argmax(-1).tolist() == generated
    session.reset()
    ours = session.prefill(ids + generated, all_logits=True)
    np.testing.assert_allclose(ours, full.numpy(), atol=1e-3)
    assert session.stats.runs == 0


def test_in_place_and_copying_are_bit_identical(bundle: Bundle):
    in_place = open_session(bundle, budget=0.25)
    copying = open_session(bundle, budget=0.25, in_place=False)
    for turn in range(2):
        ids = text(turn, 90)
        np.testing.assert_array_equal(in_place.prefill(ids), copying.prefill(ids))
        for token in text(9, 30):
            np.testing.assert_array_equal(in_place.step([token]), copying.step([token]))
    for layer, live in enumerate(in_place.length[:, 0]):
        for name in ("key", "value"):
            first, second = (each.engine.read(name, layer)[:, :, :live] for each in (in_place, copying))
            np.testing.assert_array_equal(first, second)


def test_batch_rows_do_not_influence_each_other(bundle: Bundle):
    """Three ragged rows together give what each gives alone, through compressions at different times."""
    prompts = [text(1, 40), text(2, 150), text(3, 100)]
    together = open_session(bundle, budget=0.25, batch=3)
    replies = together.generate(prompts, max_new_tokens=60)
    for row, prompt in enumerate(prompts):
        alone = open_session(bundle, budget=0.25)
        assert alone.generate(prompt, max_new_tokens=60)[0] == replies[row]
        np.testing.assert_array_equal(alone.length[:, 0], together.length[:, row])
        for ours, theirs in zip(alone.slot_position, together.slot_position, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


def test_a_finished_row_keeps_its_state(bundle: Bundle):
    session = open_session(bundle, budget=0.5, batch=2)
    logits = session.prefill([text(1, 30), text(2, 30)])
    token = logits.argmax(-1)
    session.step(token, active=np.array([True, False]))
    assert session.position.tolist() == [31, 30] and session.length[0].tolist() == [31, 30]
    alone = open_session(bundle, budget=0.5)
    expected = alone.step(alone.prefill(text(2, 30)).argmax(-1)).copy()
    np.testing.assert_allclose(session.step(token)[1], expected[0], atol=1e-5)


def test_prompt_longer_than_the_capacity(bundle: Bundle):
    """400 tokens through 128 slots: memory stays bounded, positions stay true."""
    session = open_session(bundle, budget=0.25)
    session.prefill(text(5, 400))
    assert session.contract.capacity == 128 and session.kept_slots.max() <= 128
    assert session.position.tolist() == [400]
    newest = session.slot_position[0][0, 0, session.length[0, 0] - 1]
    assert newest == 399


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(st.integers(1, 140), st.integers(0, 25)), min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_length_never_exceeds_capacity(bundle: Bundle, turns: list[tuple[int, int]], seed: int):
    session = open_session(bundle, budget=0.25)
    for number, (prompt, steps) in enumerate(turns):
        if session.position[0] + prompt + steps > session.max_context:
            with pytest.raises(SemkvError, match="do not fit the context"):
                session.prefill(text(seed, session.max_context + 1))
            break
        session.prefill(text(seed + number, prompt))
        assert session.kept_slots.max() <= session.contract.capacity
        for token in text(seed, steps):
            session.step([token])
            assert session.kept_slots.max() <= session.contract.capacity
        session.end_turn()
    # Every live slot holds a position that was seen, in rising order.
    for layer, live in enumerate(session.length[:, 0]):
        positions = session.slot_position[layer][0, 0, :live]
        assert (np.diff(positions) > 0).all() and positions[-1] == session.position[0] - 1


def test_compress_at_turn_keeps_the_budget_of_what_was_seen(tiny_export: Path, tmp_path: Path):
    decoder = str(tiny_export / "decoder.onnx")
    method = SemantiCache(compress_at="turn")
    session = open_session(build_bundle(decoder, tmp_path / "b", budgets=[0.25], method=method, weights="fp32"))
    for turn in range(3):
        session.prefill(text(turn, 60))
        for token in text(9, 10):
            session.step([token])
        session.end_turn()
        assert session.kept_slots[0] <= np.ceil(0.25 * session.position[0])
        assert session.slot_position[0][0, 0, session.length[0, 0] - 1] == session.position[0] - 1
    assert session.stats.runs == 3


def test_stop_ids_end_a_reply_and_are_not_appended(bundle: Bundle):
    session = open_session(bundle, budget=1.0)
    free = session.generate(text(3, 20), max_new_tokens=12)[0]
    stop = free[5]
    session.reset()
    stopped = session.generate(text(3, 20), max_new_tokens=12, stop_ids=[stop])[0]
    assert stopped == free[: free.index(stop)]
    assert session.position[0] == 20 + len(stopped)


def test_prompt_beyond_max_context_appends_nothing(bundle: Bundle):
    session = open_session(bundle, budget=0.25)
    with pytest.raises(SemkvError, match=r"prompt: 513 more tokens do not fit the context \(expected at most 512"):
        session.prefill(text(0, 513))
    assert session.position[0] == 0

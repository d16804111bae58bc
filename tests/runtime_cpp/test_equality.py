"""libsemkv holds a conversation as Python's session does: the same logits, slots, caches and tokens, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from semkv_deploy import open_bundle, open_session
from semkv_deploy.runtime.sampling import Sampler
from semkv_deploy.runtime.session import Session

from ..bundle.test_contract import GROUPS, windowed_export, words  # noqa: F401
from .driver import Driver

CASES = [
    ("streaming-llm", 1),
    ("streaming-llm, at turns", 4),
    ("streaming-llm, isolated", 4),
    ("semanticache", 4),
    ("semanticache, by head, at turns", 1),
    ("importance", 4),
    ("importance, predicted, at turns, no sinks", 1),
    ("sonic", 4),
    ("sonic, at turns, with a window", 1),
    ("dynsplit", 4),
    ("dynsplit, predicted, at turns", 1),
    ("dynsplit, chosen of what stays", 4),
    ("dynsplit-select", 4),
    ("full", 1),
]
"""Every method, with one row or four: one that compresses when full, and one at turns."""


def session_of(bundle: Path, batch: int) -> Session:
    return open_session(open_bundle(bundle), batch=batch, threads=1)


def same_state(session: Session, cpp: Driver, folder: Path) -> None:
    """Positions, lengths, chunks, slot columns, caches and what behaviours keep: all that a saved session has."""
    session.save(folder / "python")
    cpp("save", path=str(folder / "cpp"))
    ours, theirs = load_file(folder / "cpp"), load_file(folder / "python")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def converse(session: Session, cpp: Driver, conversation: int, folder: Path, turns: int = 3) -> None:
    """A conversation with ragged prompts, in which the last row stops first."""
    batch = session.batch
    for turn in range(turns):
        prompts = [words(10 * turn + row + conversation, 90 + 17 * row) for row in range(batch)]
        logits = session.prefill(prompts)
        np.testing.assert_array_equal(cpp.prefill(prompts), logits)
        for step in range(6):
            tokens = logits.argmax(-1)
            active = np.array([row < batch - 1 or batch == 1 or step < 4 for row in range(batch)])
            ours, logits = cpp.step(tokens.tolist(), active.tolist()), session.step(tokens, active).copy()
            logits[~active], ours[~active] = 0, 0
            np.testing.assert_array_equal(ours, logits)
        session.end_turn()
        cpp("end_turn")
        same_state(session, cpp, folder)


@pytest.mark.parametrize("name, batch", CASES)
def test_three_conversations_of_three_turns(
    name: str, batch: int, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    bundle = bundle_of(name)
    session = session_of(bundle, batch)
    with Driver(driver) as cpp:
        cpp.open(bundle, batch)
        for conversation in range(3):
            converse(session, cpp, conversation, tmp_path)
            stats = cpp("stats", row=0)
            assert stats["compressions"] == session.stats.runs and stats["evicted"] == session.stats.evicted
            assert (stats["position"], stats["kept_slots"]) == (session.position[0], session.kept_slots[0])
            assert stats["compressions"] > 0 or name in ("full", "dynsplit-select")
            session.reset()
            cpp("reset")


@pytest.mark.parametrize("name, groups", [("semanticache", "mixed"), ("importance", "by head"), ("sonic", "mixed")])
def test_groups_of_unequal_capacities(
    name: str, groups: str, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    bundle = bundle_of(name, groups=GROUPS[groups])
    session = session_of(bundle, 2)
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        converse(session, cpp, 0, tmp_path)
    assert len({group.capacity for group in session.contract.cache.groups}) > 1 or groups == "by head"


@pytest.mark.parametrize("name", ["semanticache", "dynsplit-select"])
def test_sliding_windows(
    name: str,
    driver: Path,
    bundle_of: Callable[..., Path],
    windowed_export: Path,  # noqa: F811
    tmp_path: Path,
):
    bundle = bundle_of(name, export=windowed_export)
    session = session_of(bundle, 2)
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        converse(session, cpp, 0, tmp_path)
    assert session.contract.windows == (0, 40)


def test_rows_live_apart(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """A row's turn ends, is compressed and is reset while others go on; one that is full costs the others nothing."""
    bundle = bundle_of("semanticache, by head, at turns")
    session = session_of(bundle, 4)
    with Driver(driver) as cpp:
        cpp.open(bundle, 4)
        for turn, row in enumerate((1, 3, 2)):
            prompts = [words(turn + each, 100 - 30 * each) if each != row else [] for each in range(4)]
            np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
            for do, call in (("end_turn", session.end_turn), ("compress", session.compress), ("reset", session.reset)):
                call((row + turn) % 4)
                cpp(do, row=(row + turn) % 4)
                same_state(session, cpp, tmp_path)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.3, "top_k": 20, "seed": 2**40 + 3},
        {"temperature": 2.0, "top_p": 0.9, "top_k": 200, "seed": 5},
    ],
    ids=str,
)
def test_generates_the_same_tokens(sampling: dict[str, Any], driver: Path, bundle_of: Callable[..., Path]):
    """Of the same seed, over two turns; rows end at a stop id or at the most tokens, and one is idle."""
    bundle = bundle_of("semanticache")
    session, sampled = session_of(bundle, 3), []
    with Driver(driver) as cpp:
        cpp.open(bundle, 3)
        for turn in range(2):
            prompts = [words(turn, 80), words(turn + 7, 31), []]
            sampler = Sampler(**sampling)
            plain = session_of(bundle, 3).generate(prompts, max_new_tokens=5, sampler=Sampler(**sampling))
            stops = [plain[0][3]]
            expected = session.generate(prompts, max_new_tokens=30, sampler=sampler, stop_ids=stops)
            answer = cpp("generate", rows=prompts, most=30, stops=stops, **sampling)
            assert answer["replies"] == expected
            assert [[row, token] for row, tokens in enumerate(expected) for token in tokens] == sorted(
                answer["called"], key=lambda pair: pair[0]
            )
            assert cpp("stats", row=1)["position"] == session.position[1]
            sampled.append(expected[1])
    assert len(sampled[0]) == 30 and len(set(sampled[0])) > 3


def test_the_bundles_own_stop_ids_are_the_default(driver: Path, bundle_of: Callable[..., Path]):
    bundle = bundle_of("full")
    session = session_of(bundle, 1)
    with Driver(driver) as cpp:
        cpp.open(bundle)
        assert cpp("info")["stop_ids"] == list(session.contract.stop_ids) == [1]
        (expected,) = session.generate(words(3, 60), max_new_tokens=400, stop_ids=[1], sampler=Sampler(30.0, seed=1))
        answer = cpp("generate", rows=[words(3, 60)], most=400, temperature=30.0, seed=1)
        assert answer["replies"] == [expected] and len(expected) < 400


def test_a_callback_ends_a_row_behind_its_token(driver: Path, bundle_of: Callable[..., Path]):
    bundle = bundle_of("full")
    session = session_of(bundle, 1)
    (expected,) = session.generate(words(1, 20), max_new_tokens=9)
    with Driver(driver) as cpp:
        cpp.open(bundle)
        answer = cpp("generate", rows=[words(1, 20)], most=9, stops=[], break_after=4)
        assert answer["replies"] == [expected[:4]]
        assert cpp("stats", row=0)["position"] == 20 + 4, "every token that was given out is in the cache"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_native_operators(
    dtype: str,
    driver: Path,
    native_library: Path,
    tiny_export: Path,
    tmp_path: Path,
):
    """Caches of every type, in the library that the caller names."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import SemantiCache
    from semkv_deploy.targets.onnxruntime import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", native_library)
        options: Any = {"budgets": [0.5], "weights": "fp32", "native": "on", "cache_dtype": dtype}
        build_bundle(str(tiny_export / "decoder.onnx"), tmp_path / "b", method=SemantiCache(), **options)
        session = session_of(tmp_path / "b", 2)
        with Driver(driver) as cpp:
            cpp.open(tmp_path / "b", 2, native_library=str(native_library))
            converse(session, cpp, 0, tmp_path)
        assert session.stats.runs > 0


@pytest.mark.parametrize("name", ["semanticache", "dynsplit-select"])
def test_steps_of_some_rows(name: str, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Rows at both ends of the batch are left out of a run: what each row is fed and writes is its own."""
    bundle = bundle_of(name)
    session = session_of(bundle, 4)
    with Driver(driver) as cpp:
        cpp.open(bundle, 4)
        prompts = [words(row, 20 + 15 * row) for row in range(4)]
        np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
        for number, wanted in enumerate(["0001", "0100", "0110", "1010", "0101", "1111", "0011", "1000"]):
            active = np.array([each == "1" for each in wanted])
            tokens = [7 + number + row for row in range(4)]
            ours, theirs = cpp.step(tokens, active.tolist()), session.step(tokens, active)
            np.testing.assert_array_equal(ours[active], theirs[active])
        same_state(session, cpp, tmp_path)

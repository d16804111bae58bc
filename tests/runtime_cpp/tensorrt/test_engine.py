"""libsemkv on TensorRT's API holds a conversation as Python's session does on the same graphs in ONNX Runtime.

The library's code runs as it would on a GPU; TensorRT and CUDA are stand-ins that work in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy import open_bundle
from semkv_deploy.runtime.session import Session
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

from ...bundle.test_contract import words
from ..test_equality import converse, same_state
from .conftest import Fake
from .fake_plans import add_plans

CASES = [
    ("semanticache", "tensorrt", "dual", 2, "float32"),
    ("semanticache", "tensorrt-rtx", "split", 2, "float16"),
    ("semanticache", "tensorrt-rtx", "single", 1, "float32"),
    ("sonic", "tensorrt-rtx", "dual", 2, "float32"),
    ("importance", "tensorrt", "dual", 2, "float32"),
    ("dynsplit-select", "tensorrt", "split", 2, "float32"),
    ("full", "tensorrt", "dual", 1, "float32"),
]
"""Every layout of engines, both targets, and behaviours that run programs of their own."""


def in_onnxruntime(bundle: Path, target: str, batch: int) -> Session:
    """Python's session on the same graphs."""
    return Session(OnnxRuntimeEngine(open_bundle(bundle).built(target), batch=batch, threads=1))


@pytest.mark.parametrize("name, target, layout, batch, dtype", CASES, ids=lambda each: str(each))
def test_conversations(
    name: str,
    target: str,
    layout: str,
    batch: int,
    dtype: str,
    fake: Fake,
    trt_bundle: Callable[..., Path],
    tmp_path: Path,
):
    """Ragged rows, prompts in pieces, steps, compression: logits, lengths, slots, caches, to the bit; and a new one."""
    bundle = trt_bundle(name, target, layout, batch, dtype)
    session = in_onnxruntime(bundle, target, batch)
    with fake.driver(bundle, target) as cpp:
        cpp.open(bundle, batch, target=target, **fake.libraries())
        for conversation in range(2):
            converse(session, cpp, conversation, tmp_path)
            stats = cpp("stats", row=0)
            assert stats["compressions"] == session.stats.runs
            assert stats["compressions"] > 0 or name in ("full", "dynsplit-select")
            session.reset()
            cpp("reset")
        assert cpp("info")["cache_bytes"] == expected_bytes(session)
    programs = {(graph.phase, 0) for p in session.contract.programs.values() for graph in p.graphs}
    decoders = {
        "dual": {("decoder", 0), ("decoder", 1)},
        "single": {("decoder", 0)},
        "split": {("prefill", 0), ("decode", 0)},
    }
    assert fake.runs() == decoders[layout] | {each for each in programs if each[0] == "compressor"}


def expected_bytes(session: Session) -> int:
    """Of every buffer, and of one spare group of each kind."""
    contract, batch = session.contract, session.batch
    spares: dict[Any, int] = {}
    total = 0
    for group in contract.cache.groups:
        sizes = {
            buffer.name: int(np.prod(buffer.sizes(group, batch=batch, head_dim=contract.head_dim)))
            * {"float32": 4, "float16": 2}[contract.dtype if buffer.dtype == "T" else buffer.dtype]
            for buffer in contract.cache.buffers
        }
        total += sum(sizes.values())
        spares[len(group.heads), group.capacity] = sum(sizes[name] for name in contract.exchanged_buffers)
    return total + sum(spares.values())


def test_phases_run_in_their_profiles(fake: Fake, trt_bundle: Callable[..., Path]):
    """A prompt never runs in the profile of steps, one token long as it may be, nor a step in that of prompts."""
    bundle = trt_bundle("semanticache", "tensorrt")
    with fake.driver(bundle, "tensorrt") as cpp:
        cpp.open(bundle, 2, target="tensorrt", **fake.libraries())
        cpp.prefill([[5], [6, 7, 8]])
        assert fake.runs() == {("decoder", 0)}
        cpp.step([5, 6])
        assert fake.runs() == {("decoder", 1)}


def test_rows_live_apart(fake: Fake, trt_bundle: Callable[..., Path], tmp_path: Path):
    """A row is reset, and one that is idle costs the others nothing."""
    bundle = trt_bundle("semanticache", "tensorrt")
    session = in_onnxruntime(bundle, "tensorrt", 2)
    with fake.driver(bundle, "tensorrt") as cpp:
        cpp.open(bundle, 2, target="tensorrt", **fake.libraries())
        for turn, row in enumerate((1, 0, 1)):
            prompts = [words(turn + each, 100 - 30 * each) if each != row else [] for each in range(2)]
            np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
            session.reset(row)
            cpp("reset", row=row)
            same_state(session, cpp, tmp_path)


@pytest.mark.parametrize("version", ["10.15.0.1", "11.1.0.106"])
def test_other_versions_tables(version: str, fake: Fake, trt_bundle: Callable[..., Path], copied: Any):
    """One build of the library calls TensorRT 10 and 11, whose virtual tables differ."""
    bundle = copied(trt_bundle("semanticache", "tensorrt"))
    add_plans(bundle, "tensorrt", version)
    session = in_onnxruntime(bundle, "tensorrt", 2)
    prompts = [words(1, 150), words(2, 90)]
    with fake.driver(bundle, "tensorrt", SEMKV_FAKE_VERSION=version) as cpp:
        cpp.open(bundle, 2, target="tensorrt", **fake.libraries())
        replies = cpp("generate", rows=prompts, most=8, stops=[])["replies"]
    assert replies == session.generate(prompts, max_new_tokens=8, stop_ids=[])


def test_a_saved_session_goes_on(fake: Fake, trt_bundle: Callable[..., Path], tmp_path: Path):
    bundle = trt_bundle("semanticache", "tensorrt-rtx", "dual", 2, "float16")
    with fake.driver(bundle, "tensorrt-rtx") as cpp:
        cpp.open(bundle, 2, target="tensorrt-rtx", **fake.libraries())
        cpp.prefill([words(1, 150), words(2, 90)])
        cpp("save", path=str(tmp_path / "state"))
        expected = cpp.prefill([words(3, 40), words(4, 40)])
        cpp.open(bundle, 2, target="tensorrt-rtx", **fake.libraries())
        cpp("load", path=str(tmp_path / "state"))
        np.testing.assert_array_equal(cpp.prefill([words(3, 40), words(4, 40)]), expected)

"""Sessions of onnxruntime-cuda: the engine that has its buffers on a device, over the emulated kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy import Session, open_bundle, open_session
from semkv_deploy.targets.onnxruntime.buffers import DeviceBuffer
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine
from semkv_deploy.validate.run import validate

pytestmark = pytest.mark.usefixtures("emulated_device")

CUDA, CPU = "onnxruntime-cuda", "onnxruntime-cpu"
COMPRESSING = ("semanticache", "importance")


def opened(root: Path, target: str, **options: Any) -> Session:
    budget = 1.0 if root.name == "select" else 0.5
    return open_session(open_bundle(root, target), target=target, budget=budget, batch=2, **options)


def conversation(session: Session) -> np.ndarray:
    """Logits of two ragged rows over prompts, steps, steps of one row, and compressions."""
    rng, seen = np.random.default_rng(0), []
    for count in (50, 3, 90):
        rows = [rng.integers(2, 500, n).tolist() for n in (count, count // 2 + 1)]
        seen.append(session.prefill(rows).copy())
        seen += [session.step(rng.integers(2, 500, 2)).copy() for _ in range(3)]
    return np.concatenate(seen)


@pytest.mark.parametrize("method", [*COMPRESSING, "select"])
def test_it_is_the_cpu_target(bundles: Path, method: str) -> None:
    """Logits and live rows of the caches within rounding; the same lengths and slots."""
    ours, theirs = (opened(bundles / method, target) for target in (CUDA, CPU))
    # The CPU's int4 weights take activations in 8 bits as well.
    allowed = 2e-4 if method != "importance" else 0.5
    np.testing.assert_allclose(conversation(ours), conversation(theirs), atol=allowed, rtol=allowed)
    np.testing.assert_array_equal(ours.length, theirs.length)
    assert (ours.stats.runs == theirs.stats.runs) and (ours.stats.runs > 0) == (method in COMPRESSING)
    for group, (mine, yours) in enumerate(zip(ours.slot_position, theirs.slot_position, strict=True)):
        np.testing.assert_array_equal(mine, yours)
        for row, used in enumerate(ours.length[group]):
            for name in ("key", "value", "slot_bias"):
                first, second = (each.engine.read(name, group)[row, :, :used] for each in (ours, theirs))
                np.testing.assert_allclose(first, second, atol=allowed, rtol=allowed)


@pytest.mark.parametrize("method", ["semanticache", "select"])
def test_in_place_and_copying_give_the_same(bundles: Path, method: str) -> None:
    first, second = (conversation(opened(bundles / method, CUDA, in_place=each)) for each in (True, False))
    np.testing.assert_array_equal(first, second)


def test_it_validates(bundles: Path) -> None:
    report = validate(bundles / "semanticache", targets=[CUDA], tokens=80)
    assert report.passed, [result.detail for result in report.results]
    assert {"in place", "copying", "in place = copying"} <= {result.name for result in report.results}


def test_every_buffer_lies_on_the_device(bundles: Path) -> None:
    """Spare ones too; what is read is a copy, what is written and cleared is there."""
    engine = opened(bundles / "semanticache", CUDA).engine
    assert isinstance(engine, OnnxRuntimeEngine)
    spare = [buffer for sets in engine._spare.values() for each in sets for buffer in each.values()]
    buffers = [buffer for of_name in engine._buffers.values() for buffer in of_name]
    assert spare and all(isinstance(buffer, DeviceBuffer) for buffer in (*spare, *buffers))
    # Two layers, two rows; one set of spare buffers: groups are compressed one after the other.
    of_a_group = 2 * 2 * engine.contract.cache.groups[0].capacity * (2 * 64 + 1) * 4
    assert engine.cache_bytes() == 3 * of_a_group
    bias = np.arange(engine.read("slot_bias", 1).size, dtype=np.float32).reshape(engine.read("slot_bias", 1).shape)
    engine.write("slot_bias", 1, bias)
    np.testing.assert_array_equal(engine.read("slot_bias", 1), bias)
    engine.reset(0)
    np.testing.assert_array_equal(engine.read("slot_bias", 1)[1], bias[1])
    assert not engine.read("slot_bias", 1)[0].any()


def test_a_saved_session_goes_on(bundles: Path, tmp_path: Path) -> None:
    session = opened(bundles / "semanticache", CUDA)
    conversation(session)
    session.save(tmp_path / "state.safetensors")
    other = opened(bundles / "semanticache", CUDA, state=tmp_path / "state.safetensors")
    np.testing.assert_array_equal(session.step([5, 6]), other.step([5, 6]))

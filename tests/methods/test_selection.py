"""Which slots a score keeps: the ONNX text against sorting in PyTorch, where digits, ties and ends could go wrong."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from semkv_deploy.methods import text
from semkv_deploy.methods.selection import KEEP_HIGHEST, keep_highest
from semkv_deploy.ops import OPSET


def graph() -> onnx.ModelProto:
    # `text.SLOTS` reads the capacity off a key cache.
    return onnx.parser.parse_model(
        f"""
        <ir_version: {text.IR_VERSION}, opset_import: ["": {OPSET}]>
        selection (float[batch,heads,capacity] pooled, float[batch,heads,capacity,dim] key_cache, int64[batch] length,
                   int64[batch] target, int64 sinks, int64[batch] recent)
            => (int64[batch,heads,capacity] keep_index) {{ {text.SLOTS} {KEEP_HIGHEST} }}
        """
    )


@pytest.mark.parametrize("scores", ["spread", "equal", "out of range", "two values"])
@pytest.mark.parametrize("capacity", [16, 4096], ids=["small", "more than TopK takes"])
def test_the_highest_stay_and_of_equal_ones_the_newest(scores: str, capacity: int):
    import onnxruntime as ort
    import torch

    random = np.random.default_rng(1)
    shape = (4, 2, capacity)
    score = {
        "spread": random.uniform(-20, 3, shape),
        "equal": np.zeros(shape),
        "out of range": random.uniform(-400, 400, shape),
        "two values": random.integers(-1, 1, shape),
    }[scores].astype(np.float32)
    # All kept; none live; more sinks and window than may stay; the rest.
    length = np.array([capacity // 2, 0, capacity, capacity - 3], np.int64)
    target = np.array([capacity, capacity, 5, capacity // 3], np.int64)
    recent = np.array([3, 3, 4, capacity // 8], np.int64)
    session = ort.InferenceSession(graph().SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"pooled": score, "key_cache": score[..., None], "length": length, "target": target, "recent": recent}
    (found,) = session.run(None, {**feeds, "sinks": np.array(2, np.int64)})
    expected = keep_highest(*(torch.from_numpy(each) for each in (score, length, target)), 2, torch.from_numpy(recent))
    np.testing.assert_array_equal(found, expected)
    assert (found[0, :, : capacity // 2] == np.arange(capacity // 2)).all() and (found[1] == -1).all()
    assert found[2, 0, :5].tolist() == [0, 1, capacity - 3, capacity - 2, capacity - 1]
    assert ((found >= 0).sum(-1) == np.minimum(length, target)[:, None]).all()

"""One score for all slots of a block: the ONNX text against the slow statement, slot by slot."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from semkv_deploy.methods import text
from semkv_deploy.methods.block_scores import Pool, pool_blocks, pool_text
from semkv_deploy.ops import OPSET

CAPACITY = 96


@pytest.mark.parametrize("pool", ["max", "mean", "mass"])
@pytest.mark.parametrize("longest", [1, 5, 16, 33])
def test_text_is_the_reference(pool: Pool, longest: int):
    """Exactly, whatever the length of blocks; dead slots are in no block, though a number lies there."""
    import onnxruntime as ort
    import torch

    random = np.random.default_rng(longest)
    shape = (3, 2, CAPACITY)
    score = random.uniform(-40, 30, shape).astype(np.float32)
    if pool == "mass":
        score = random.uniform(-14, 0.5, shape).astype(np.float32)
    begins = random.random(shape) < 0.15
    begins[..., ::longest] = True
    block = np.cumsum(begins * random.integers(1, 9, shape), -1)
    length = np.array([CAPACITY, CAPACITY - 9, 0])
    graph = onnx.parser.parse_model(
        f"""
        <ir_version: {text.IR_VERSION}, opset_import: ["": {OPSET}]>
        pooled (float[batch,heads,capacity] score, int64[batch,heads,capacity] slot_block,
                float[batch,heads,capacity,dim] key_cache, int64[batch] length, int64[batch] target)
            => (float[batch,heads,capacity] pooled) {{ {text.SLOTS} {pool_text(pool, longest)} }}
        """
    )
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"score": score, "slot_block": block, "length": length, "target": length, "key_cache": score[..., None]}
    (found,) = session.run(None, feeds)
    expected = pool_blocks(*(torch.from_numpy(each) for each in (score, block, length)), pool).numpy()
    for row, live in enumerate(length):
        # Exp and Log differ by a rounding between PyTorch and ONNX Runtime.
        np.testing.assert_allclose(found[row, :, :live], expected[row, :, :live], rtol=1e-5 if pool == "mass" else 0)
        for head in range(shape[1]):
            numbers = block[row, head, :live]
            alike = {number: set(found[row, head, :live][numbers == number].tolist()) for number in numbers.tolist()}
            assert all(len(scores) == 1 for scores in alike.values())
    if longest > 1:
        assert len(np.unique(expected[0])) < len(np.unique(score[0]))

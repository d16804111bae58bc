"""SemanticBlockMap natively: the reference's representatives and slots, and errors where the body would read on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semkv_deploy.ops import semantic_block_map
from tests.native.runner import run_node
from tests.ops.test_semantic_block_map import RAGGED, make_inputs


def run(library: Path, inputs: list[torch.Tensor], threads: int = 1, **attributes: int) -> list[torch.Tensor]:
    """Both outputs; 7 in what the operator left unwritten."""
    (batch, heads, _, size), blocks = inputs[0].shape, inputs[1].shape[1]
    vectors, longest = attributes["vectors"], attributes["max_block_length"]
    fresh = {
        "representatives": torch.full((batch, heads, blocks, vectors, size), 7.0),
        "block_slots": torch.full((batch, blocks, longest), 7),
    }
    return run_node(library, "SemanticBlockMap", (), inputs, fresh, threads=threads, **attributes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("lengths", [RAGGED, [[7]], [[0], [5]]], ids=["many", "one", "one or none"])
def test_it_is_the_reference(lengths: list[list[int]], vectors: int, threads: int, native_library: Path):
    inputs = make_inputs(lengths, heads=3, size=24)
    attributes = {"vectors": vectors, "max_block_length": 7}
    ours = run(native_library, inputs, threads, **attributes)
    expected = semantic_block_map.reference(*inputs, **attributes)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-6 if vectors == 1 else 0)
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize(
    ("start", "length", "words"),
    [
        (35, 7, "block 0 reaches outside the cache.*0 to 39.*35 to 41"),
        (-1, 3, "block 0 reaches outside the cache"),
        (0, 8, "block 0 has a length out of range.*0 to 7.*8"),
        (2**62, 7, "block 0 reaches outside the cache"),
    ],
)
def test_a_block_that_is_not_in_the_cache_is_an_error(start: int, length: int, words: str, native_library: Path):
    keys = make_inputs([[1]])[0]
    inputs = [keys, torch.tensor([[start]]), torch.tensor([[length]])]
    with pytest.raises(Exception, match=f"(?s){words}"):
        run(native_library, inputs, vectors=2, max_block_length=7)

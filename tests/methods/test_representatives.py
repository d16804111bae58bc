"""What stands for a block's keys: the program against its slow statement, and bounds that are bounds."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semkv_deploy.methods import DynSplitSelect
from semkv_deploy.methods.map_blocks import map_program
from semkv_deploy.methods.representatives import MAP_BLOCKS, Kind, bound, reference, table_size

from .test_compressors import DIM, HEADS, facts

KINDS: tuple[Kind, ...] = get_args(Kind)
BATCH, CAPACITY, BLOCKS, LONGEST = 2, 90, 12, 20
NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16}


def example(kind: Kind, dtype: str) -> dict[str, np.ndarray]:
    """Three blocks a row, one of them of a single slot, and a place that is none's."""
    random = np.random.default_rng(3)
    vectors, size = table_size(kind, DIM)
    return {
        "key_cache": random.standard_normal((BATCH, HEADS, CAPACITY, DIM)).astype(NUMPY[dtype]),
        "representatives": random.standard_normal((BATCH, HEADS, BLOCKS, vectors, size)).astype(NUMPY[dtype]),
        "block_start": np.array([[0, 17, 37, 0], [5, 6, 70, 0]]),
        "block_length": np.array([[17, 20, 13, 0], [1, 19, 20, 0]]),
        "block_number": np.array([[0, 1, 2, BLOCKS - 1], [4, 5, 9, BLOCKS - 1]]),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NUMPY)
def test_the_program_is_its_reference(kind: Kind, dtype: str):
    """What is not named stays, bit for bit."""
    state = example(kind, dtype)
    program = map_program(facts(dtype=dtype), longest=LONGEST, kind=kind)
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, state)
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    blocks = {name: tensors.pop(name) for name in ("block_start", "block_length", "block_number")}
    method = DynSplitSelect(block=16, search=4, representatives=kind)
    expected = method.reference(MAP_BLOCKS)(facts(), tensors, **blocks)["representatives"].numpy()
    np.testing.assert_allclose(
        found.astype(np.float32), expected.astype(np.float32), rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-6
    )
    untouched = np.ones((BATCH, BLOCKS), bool)
    untouched[np.arange(BATCH)[:, None], state["block_number"]] = False
    np.testing.assert_array_equal(found.swapaxes(1, 2)[untouched], state["representatives"].swapaxes(1, 2)[untouched])
    assert not found[:, :, -1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["min_max", "mean_radius"])
@given(seed=st.integers(0, 1 << 30), length=st.integers(1, LONGEST), size=st.sampled_from([1e-2, 1.0, 30.0]))
@settings(max_examples=40, deadline=None)
def test_a_score_bounds_every_product(kind: Kind, dtype: torch.dtype, seed: int, length: int, size: float):
    """The largest q.k of a block, in the type that keys, queries and representatives are stored in."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(DIM, generator=generator) * size
    keys = (centre + torch.randn(1, 1, LONGEST, DIM, generator=generator) * size / 3).to(dtype)
    # Along a key's distance from the mean the bound is tight: rounding has nowhere to hide.
    away = keys[0, 0, 0].float() - keys[0, 0, :length].float().mean(0)
    for query in (torch.randn(DIM, generator=generator) * size, away):
        query = query.to(dtype)
        table = reference(kind, keys, torch.tensor([[0]]), torch.tensor([[length]]), LONGEST)
        products = keys[0, 0, :length].double() @ query.double()
        rounding = 1e-5 * float(query.double().norm() * keys.double().norm(dim=-1).max())
        assert float(bound(kind, query, table[0, 0])[0]) >= float(products.max()) - rounding


def test_a_radius_costs_little_more_than_half():
    (vectors, size), (wide, head) = table_size("mean_radius", 64), table_size("min_max", 64)
    assert vectors * size == 72 and wide * head == 128


def test_radii_tell_blocks_apart_that_means_do_not():
    """Two blocks of one mean: in one of them a key points along the query."""
    keys = torch.zeros(1, 1, 8, DIM)
    keys[0, 0, 0, 0], keys[0, 0, 1, 0] = 4, -4
    start, length = torch.tensor([[0, 4]]), torch.tensor([[4, 4]])
    query = torch.zeros(DIM)
    query[0] = 1
    scores = {kind: bound(kind, query, reference(kind, keys, start, length, 4)[0, 0]).tolist() for kind in KINDS}
    assert scores["mean"] == [0, 0]
    assert all(scores[kind][0] >= 4 > scores[kind][1] == 0 for kind in ("min_max", "mean_radius"))

"""Blocks that are chosen: how they lie in a cache changes nothing, and the command that times their mapping."""

from __future__ import annotations

import json
import sys

import block_times
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semkv_deploy.ops import nexus_attention, semantic_block_map, semantic_block_select

HEADS, DIM, LONGEST = 2, 8, 6


def attended(keys: torch.Tensor, values: torch.Tensor, lengths: list[int], pinned: list[int], query: torch.Tensor):
    """Attention of one query to the chosen of the blocks that lie behind one another in `[H,C,D]`; chosen keys."""
    slots = keys.shape[1]
    length = torch.tensor([lengths])
    start = torch.cumsum(length, 1) - length
    room = torch.zeros(1, HEADS, 1, DIM, dtype=keys.dtype)
    key_cache, value_cache = (torch.cat([of[None], room], 2) for of in (keys, values))
    table, block_slots = semantic_block_map.reference(key_cache, start, length, 2, LONGEST)
    count = torch.tensor([len(lengths)])
    (index,) = semantic_block_select.reference(query, table, block_slots, count, torch.tensor([pinned]), 4 * LONGEST)
    bias, live = torch.zeros(1, HEADS, slots + 1), torch.tensor([slots])
    given = (query, room, room, key_cache, value_cache, bias, live)
    output = nexus_attention.reference(*given, slot_index=index)[0]
    chosen = [{tuple(keys[h, slot].tolist()) for slot in index[0, h].tolist() if slot >= 0} for h in range(HEADS)]
    return output, chosen


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, LONGEST), min_size=2, max_size=14), st.randoms(), st.integers(0, 1 << 30))
def test_permuting_stored_blocks_changes_nothing(lengths: list[int], random, seed: int):
    """The same blocks are chosen, wherever they lie, and attention to them is the same."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(HEADS, sum(lengths), DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    query = torch.randn(1, 2 * HEADS, 1, DIM, generator=generator, dtype=torch.float64)
    pinned = [int(n == 0) for n in range(len(lengths))]
    order = list(range(len(lengths)))
    random.shuffle(order)
    whole = [list(each) for each in zip(*(part.split(lengths, 1) for part in (keys, values)), strict=True)]
    moved = (torch.cat([whole[n][part] for n in order], 1) for part in range(2))
    first, kept = attended(keys, values, lengths, pinned, query)
    # What does not fit whole is cut, and of blocks that score alike the first counts: neither is so here.
    second, others = attended(*moved, [lengths[n] for n in order], [pinned[n] for n in order], query)
    assert kept == others
    torch.testing.assert_close(first, second, atol=1e-10, rtol=0)


def test_the_command_that_times_uniform_mapping(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """It compares what it times first; numbers of a toy say nothing, so only that they are there."""
    sizes = ["--slots", "512", "--width", "128", "--layers", "2", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["block_times.py", *sizes, "--json"])
    block_times.main()
    found = json.loads(capsys.readouterr().out)
    assert {"whole", "together", "fixed", "table", "loop"} <= found["ms"].keys()
    assert found["ms"]["loop"] > 0 and found["overhead_loop_over"].keys() <= {"table"}

"""GGUF files: parts, left-over tensors, ends of turns, rotary factors, and headers that contradict themselves."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.checkpoint import load_checkpoint
from semkv_deploy.export.gguf import read_header
from tests.tiny import tiny_gguf_at

Write = Callable[..., Path]


@pytest.fixture()
def write(tmp_path: Path) -> Write:
    """`write(name, without=…, extra=…, keys=…)`: a tiny Llama as a GGUF file."""

    def make(name: str = "tiny.gguf", **options: Any) -> Path:
        return tiny_gguf_at(tmp_path / name, **options)

    return make


def test_every_end_of_the_file_is_kept(write: Write):
    path = write(keys=lambda writer: (writer.add_eot_token_id(258), writer.add_eom_token_id(259)))
    assert read_header(path).end_token_ids == (257, 258, 259)
    assert load_checkpoint(str(path)).model.generation_config.eos_token_id == [257, 258, 259]


@pytest.mark.parametrize("name", ["m-00002-of-00003.gguf", "renamed.gguf"])
def test_a_part_says_how_to_merge(name: str, write: Write):
    path = write(name, keys=lambda writer: (writer.add_uint16("split.no", 1), writer.add_uint16("split.count", 3)))
    with pytest.raises(SemkvError, match=r"one part of a split GGUF .*1 of 3 parts.*llama-gguf-split --merge \S+ \S+"):
        load_checkpoint(str(path))


def test_a_part_by_its_name_alone(write: Write):
    with pytest.raises(SemkvError, match=r"--merge m-00001-of-00002\.gguf m\.gguf"):
        load_checkpoint(str(write("m-00002-of-00002.gguf")))


def test_a_missing_layer_is_named(write: Write):
    with pytest.raises(SemkvError, match=r"9 tensors are not in the checkpoint .*model\.layers\.1\."):
        load_checkpoint(str(write(without="blk.1")))


def test_a_tensor_without_a_place_is_named(write: Write):
    path = write(extra={"blk.0.attn_q.bias": np.ones(64, np.float32)})
    with pytest.raises(SemkvError, match=r"no place for .*blk\.0\.attn_q\.bias"):
        load_checkpoint(str(path))


def test_rotary_factors_divide_the_frequencies(write: Write):
    plain = load_checkpoint(str(write("plain.gguf"))).model.model.rotary_emb.inv_freq
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    scaled = load_checkpoint(str(write("scaled.gguf", extra={"rope_freqs.weight": factors})))
    torch.testing.assert_close(scaled.model.model.rotary_emb.inv_freq, plain / torch.from_numpy(factors))
    with pytest.raises(SemkvError, match="rotary factors do not fit"):
        load_checkpoint(str(write("odd.gguf", extra={"rope_freqs.weight": factors[:5]})))


def test_a_file_cut_short(write: Write, tmp_path: Path):
    content = write().read_bytes()
    for size in (9, 30, 200, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(SemkvError, match="the GGUF file is damaged"):
            load_checkpoint(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [1 << 20, 1 << 62, (1 << 64) - 1])
def test_counts_beyond_the_file_are_refused_at_once(at: int, count: int, write: Write):
    path = write()
    content = bytearray(path.read_bytes())
    content[at : at + 8] = struct.pack("<Q", count)
    path.write_bytes(content)
    with pytest.raises(SemkvError, match="the GGUF file is damaged"):
        load_checkpoint(str(path))


def test_sizes_that_no_model_has_are_refused_before_anything_is_made(write: Write):
    path = write(keys=lambda writer: writer.add_block_count(10**8))
    with pytest.raises(SemkvError, match="num_hidden_layers is none of a model"):
        load_checkpoint(str(path))

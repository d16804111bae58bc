"""Adapter files: what is written is read again, and what is wrong with a file is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.sonic_adapter import SonicAdapter, check_base, fingerprint, load_adapter, save_adapter

EMBEDDING = np.random.default_rng(1).normal(size=(1100, 8)).astype(np.float32)


def adapter(**changes: Any) -> SonicAdapter:
    draw = np.random.default_rng(0)
    shapes = {
        "nexus.embedding": (4, 8),
        "turn.embedding": (3, 8),
        "layers.0.q_proj.lora_A": (2, 8),
        "layers.0.q_proj.lora_B": (6, 2),
        "layers.1.down_proj.lora_A": (2, 12),
        "layers.1.down_proj.lora_B": (8, 2),
    }
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    made = SonicAdapter(tensors, fingerprint(EMBEDDING), k_max=4, turns_max=3, rank=2, hidden=8, layers=2,
                        trained={"steps": 5})  # fmt: skip
    return dataclasses.replace(made, **changes)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in adapter().tensors.items() if key != name}


def changed(name: str, value: Any) -> dict[str, Any]:
    return {**adapter().tensors, name: value}


@pytest.mark.parametrize(("placement", "common"), [("appended", ()), ("spread", ()), ("spread", (7, 0, 500))])
def test_what_is_written_is_read_again(placement: Any, common: tuple[int, ...], tmp_path: Path):
    path = tmp_path / "new" / "adapter.safetensors"
    save_adapter(path, adapter(placement=placement, common=common))
    read = load_adapter(path)
    assert {name: tensor.tobytes() for name, tensor in read.tensors.items()} == {
        name: tensor.tobytes() for name, tensor in adapter().tensors.items()
    }
    assert dataclasses.replace(read, tensors={}) == adapter(tensors={}, placement=placement, common=common)
    assert read.modules == ((0, "q_proj"), (1, "down_proj"))
    assert [path.name for path in path.parent.iterdir()] == ["adapter.safetensors"]


def test_a_row_is_a_slot_and_its_turn_and_later_turns_share_the_last():
    made = adapter()
    nexus, turn = made.tensors["nexus.embedding"], made.tensors["turn.embedding"]
    assert np.array_equal(made.rows(1, 3), nexus[:3] + turn[1])
    assert np.array_equal(made.rows(9, 4), nexus + turn[2])
    with pytest.raises(SemkvError, match=r"no such Nexus rows .expected at most 4, of turn 0 or later, got 5"):
        made.rows(0, 5)


def test_the_base_is_known_by_the_first_rows_of_its_embeddings():
    check_base(adapter(), EMBEDDING, 2)
    later = EMBEDDING.copy()
    later[1024:] += 1
    check_base(adapter(), later, 2)
    other = EMBEDDING.copy()
    other[1023, 7] += 1
    for embedding, layers, sentence in (
        (other, 2, r"another base model: its first embedding rows \(SHA-256\) differs"),
        (EMBEDDING[:, :7], 2, "another base model: its hidden size differs .expected 8, got 7"),
        (EMBEDDING, 3, "another base model: its number of layers differs .expected 2, got 3"),
    ):
        with pytest.raises(SemkvError, match=sentence):
            check_base(adapter(), embedding, layers)


@pytest.mark.parametrize("cut", [4, 100, 600])
def test_a_truncated_file_is_damaged(tmp_path: Path, cut: int):
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(SemkvError, match=r"the adapter is damaged .*Copy it again"):
        load_adapter(path)


def test_other_files_are_refused(tmp_path: Path):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    with pytest.raises(SemkvError, match="no such adapter"):
        load_adapter(path)
    save_file({"x": np.zeros(2, np.float32)}, path)
    with pytest.raises(SemkvError, match=r"not a SONIC adapter .expected format semkv-sonic-1 or \S+-2, got None"):
        load_adapter(path)
    save_file({"x": np.zeros(2, np.float32)}, path, {"format": "semkv-sonic-1", "k_max": "-4"})
    with pytest.raises(SemkvError, match=r"no number for k_max in its metadata .got '-4'"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tensors": without("turn.embedding")}, "a tensor is missing .expected turn.embedding"),
        ({"tensors": without("layers.0.q_proj.lora_B")}, "missing .expected layers.0.q_proj.lora_B"),
        ({"tensors": without("layers.1.down_proj.lora_A")}, "missing .expected layers.1.down_proj.lora_A"),
        ({"tensors": changed("head.weight", np.zeros((2, 2), np.float32))}, "no adapter has .got head.weight"),
        ({"k_max": 5}, r"nexus.embedding is not as it should be .expected float32 \[5, 8\], got float32 \[4, 8\]"),
        ({"rank": 3}, r"lora_A is not as it should be .expected float32 \[3, 'any'\]"),
        ({"layers": 1}, "a layer that is not there"),
        ({"corner": "round"}, "unknown corner .expected causal or full, got round"),
        ({"tensors": changed("turn.embedding", np.full((3, 8), np.nan, np.float32))}, "not finite"),
        ({"turns_max": 0}, "are 1 at least"),
        ({"placement": "spread", "common": (3, 4, 3)}, "other than tokens, each once"),
        ({"placement": "spread", "common": (-1,)}, "other than tokens, each once"),
        ({"common": (3,)}, "that spread rows begin as"),
    ],
)
def test_contradictions_are_neither_written_nor_read(tmp_path: Path, changes: dict[str, Any], sentence: str):
    path = tmp_path / "a.safetensors"
    with pytest.raises(SemkvError, match=sentence):
        save_adapter(path, adapter(**changes))
    assert not path.exists()

"""SONIC's graphs against plain PyTorch; ordinary rows are the base model's bit for bit; adapters that do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Method, Sonic
from semkv_deploy.methods.layout import COMPRESS
from semkv_deploy.methods.sonic_adapter import load_adapter, save_adapter
from semkv_deploy.methods.sonic_decoder import add_adapter
from semkv_deploy.methods.sonic_reference import with_adapter
from semkv_deploy.passes.branch_adapters import branch_adapters
from tests.tiny import tiny_adapter_at

from .test_compressors import CAPACITY, HEADS, example, facts

LAYERS, LIVE, SLOTS, VOCAB = 2, 20, 48, 512


@pytest.fixture(scope="module")
def adapter(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter_at(tiny_export, tmp_path_factory.mktemp("adapter") / "a.safetensors")


def decoder(export: Path, adapter: Path | None, branched: bool = False) -> bytes:
    model = ir.load(export / "decoder.onnx")
    if adapter is not None:
        add_adapter(model, load_adapter(adapter))
    if branched:
        # Query, key and value share one, gate and up as well.
        assert branch_adapters(model) == 4 * LAYERS
    ir.external_data.load_to_model(model)
    return bytes(ir.to_proto(model).SerializeToString())


def feeds(ids: list[int]) -> dict[str, Any]:
    """A run of rows behind 20 live slots."""
    random, rows = np.random.default_rng(1), len(ids)
    given: dict[str, Any] = {
        "input_ids": np.array([ids]),
        "position_ids": np.arange(rows)[None] + LIVE,
        "logits_index": np.arange(rows)[None],
        "length": np.full((LAYERS, 1), LIVE),
    }
    for layer in range(LAYERS):
        for name in ("key", "value"):
            given[f"past_key_values.{layer:02d}.{name}"] = random.standard_normal((1, HEADS, SLOTS, 16), np.float32)
        given[f"slot_bias.{layer:02d}"] = np.zeros((1, HEADS, SLOTS), np.float32)
    return given


def run(model: bytes, given: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


@pytest.mark.parametrize("branched", [False, True], ids=["portable", "behind conditions"])
def test_ordinary_rows_are_the_base_models_bit_for_bit(branched: bool, adapter: Path, tiny_export: Path):
    """In a run of its own, and before Nexus rows of the same run."""
    words = [7, 300, 12, 511, 0]
    base = run(decoder(tiny_export, None), feeds(words))
    adapted = decoder(tiny_export, adapter, branched)
    for name, array in run(adapted, feeds(words)).items():
        np.testing.assert_array_equal(array, base[name], err_msg=name)
    mixed, plain = run(adapted, feeds([*words, 512, 513])), run(decoder(tiny_export, None), feeds([*words, 1, 1]))
    np.testing.assert_array_equal(mixed["logits"][:, :5], plain["logits"][:, :5])
    assert not np.array_equal(mixed["logits"][:, 5:], plain["logits"][:, 5:])


@pytest.mark.parametrize("placement", ["appended", "spread"])
@pytest.mark.parametrize("branched", [False, True], ids=["portable", "behind conditions"])
def test_nexus_rows_are_those_of_the_reference(
    branched: bool, placement: str, tiny_export: Path, tiny_checkpoint: Path, tmp_path: Path
):
    """Rows of the first and of the last turn, with words between; spread ones begin as a token each."""
    import torch
    from transformers import AutoModelForCausalLM

    from semkv_deploy.export.decoder import ReferenceDecoder

    adapter = tiny_adapter_at(tiny_export, tmp_path / "a.safetensors", placement=placement)
    numbers, begins = (0, 7, 2 * 8, 3 * 8 - 1), (0, 9, 300, VOCAB - 1)
    nexus = [
        VOCAB + number * VOCAB + token if placement == "spread" else VOCAB + number
        for number, token in zip(numbers, begins, strict=True)
    ]
    given = feeds([7, *nexus[:2], 30, *nexus[2:]])
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32").eval()
    with with_adapter(model, load_adapter(adapter)):
        expected = ReferenceDecoder(model)({name: torch.from_numpy(array) for name, array in given.items()})
    for name, array in run(decoder(tiny_export, adapter, branched), given).items():
        np.testing.assert_allclose(array, expected[name].numpy(), atol=2e-4, err_msg=name)
        assert array.shape == expected[name].shape
    # Outside the block the model is itself again.
    with pytest.raises(IndexError):
        model(torch.tensor([[VOCAB]]))


def test_a_spread_row_of_nothing_learned_is_the_token_itself(tiny_export: Path, tmp_path: Path):
    """Tables and LoRA weights of 0: logits and caches are those of the tokens that rows begin as."""
    learned = load_adapter(tiny_adapter_at(tiny_export, tmp_path / "a.safetensors", placement="spread"))
    nothing = {name: np.zeros_like(tensor) for name, tensor in learned.tensors.items()}
    save_adapter(tmp_path / "b.safetensors", dataclasses.replace(learned, tensors=nothing))
    words = [300, 12, 511]
    rows = [VOCAB + number * VOCAB + token for number, token in enumerate(words)]
    ours, plain = (
        run(decoder(tiny_export, tmp_path / "b.safetensors"), feeds(rows)),
        run(decoder(tiny_export, None), feeds(words)),
    )
    for name, array in ours.items():
        np.testing.assert_allclose(array, plain[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("placement", ["appended", "spread"])
def test_dropping_slots_matches_the_reference(placement: Any):
    import onnxruntime as ort
    import torch

    method = Sonic(placement=placement)
    state = example(method, batch=3)
    keep = np.full((3, 1, CAPACITY), -1)
    keep[0, 0, :50] = np.r_[0:4, 60:106]
    keep[1, 0, : CAPACITY - 7] = np.arange(CAPACITY - 7)
    random = np.random.default_rng(0)
    columns = {name: random.integers(-1, 9, (3, 1, CAPACITY)) for name in method.more_columns}
    feed = {**state, "keep_index": keep, **columns}
    graph = method.compressor(facts())
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feed), strict=True))
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    inputs = {"keep_index": tensors.pop("keep_index")}
    expected = method.reference(COMPRESS)(facts(), tensors, **inputs)
    assert outputs["length_out"].tolist() == [50, CAPACITY - 7, 0]
    assert outputs["evicted"].tolist() == [CAPACITY - 50, 0, CAPACITY - 14] and outputs["level"].tolist() == [0, -1, 0]
    for name, array in outputs.items():
        np.testing.assert_array_equal(array, expected[name.removesuffix("_out")].numpy(), err_msg=name)


def build(method: Method, export: Path, out: Path) -> None:
    build_bundle(export / "decoder.onnx", out, budgets=[0.25], method=method, weights="fp32", native="off")


@pytest.mark.parametrize(
    "changes, options, words",
    [
        ({"base": "0" * 64}, {}, r"for another base model: its first embedding rows .SHA-256. differs"),
        ({"layers": 3}, {}, r"for another base model: its number of layers differs.*expected 3, got 2"),
        ({"corner": "full"}, {}, r"Nexus rows that all see each other.*expected corner causal"),
        ({}, {"tokens": 9}, r"fewer Nexus rows than are asked for .expected at most 8, got 9"),
        ({"placement": "spread", "common": (3, 512)}, {}, r"names tokens beyond the vocabulary.*below 512, got 512"),
        ({"turns_max": 3}, {"nexus_share": 0.5, "tokens": 18}, r"expected at most 8, got 9"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    changes: dict[str, Any], options: dict[str, Any], words: str, tiny_export: Path, tmp_path: Path
):
    path = tiny_adapter_at(tiny_export, tmp_path / "a.safetensors", **changes)
    with pytest.raises(SemkvError, match=words):
        build(Sonic(adapter=str(path), **options), tiny_export, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_file_that_is_missing_cut_or_no_adapter_is_refused(adapter: Path, tiny_export: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match="cannot be read"):
        Sonic(adapter=str(tmp_path / "nothing"))
    with pytest.raises(SemkvError, match=r"sonic needs an adapter.*--method-option adapter=FILE"):
        build(Sonic(), tiny_export, tmp_path / "b")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(SemkvError, match="the adapter is damaged"):
        build(Sonic(adapter=str(cut)), tiny_export, tmp_path / "b")
    with pytest.raises(SemkvError, match=r"takes tokens from the middle.*Use streaming-llm"):
        Sonic(adapter=str(adapter)).resolve(facts(windows=(8,)))
    with pytest.raises(SemkvError, match=r"another base model: its hidden size differs.*expected 64, got 32"):
        Sonic(adapter=str(adapter)).resolve(facts(hidden_size=32, layers=2, windows=(0, 0)))
    assert not (tmp_path / "b").exists()


def test_a_bundle_needs_the_adapters_file_no_more(adapter: Path, tiny_export: Path, tmp_path: Path):
    """Its name and SHA-256 are in the manifest, its path is not; one of other content is another method."""
    import hashlib

    from semkv_deploy.bundle import Bundle
    from semkv_deploy.runtime.open import open_session

    file = tmp_path / "mine.safetensors"
    file.write_bytes(adapter.read_bytes())
    method = Sonic(adapter=str(file))
    build(method, tiny_export, tmp_path / "b")
    file.unlink()
    (tmp_path / "b").rename(tmp_path / "moved")
    opened = Bundle.open(tmp_path / "moved")
    found = opened.manifest.method
    assert isinstance(found, Sonic) and found.adapter == "mine.safetensors" and found.k_max == 8
    assert found.adapter_sha256 == hashlib.sha256(adapter.read_bytes()).hexdigest() == method.adapter_sha256
    assert str(tmp_path) not in (tmp_path / "moved" / "bundle.json").read_text()
    session = open_session(opened)
    session.prefill([5] * 30)
    session.compress()
    assert session.length[0, 0] == 4 + 7


def test_weights_for_a_module_that_is_not_there_are_refused(adapter: Path, tiny_export: Path):
    model = ir.load(tiny_export / "decoder.onnx")
    node = next(node for node in model.graph if node.name == "layers.01.mlp.up_proj/MatMul")
    node.name = "layers.01.mlp.gate_up/MatMul"
    with pytest.raises(SemkvError, match="has no module up_proj in layer 1"):
        add_adapter(model, load_adapter(adapter))

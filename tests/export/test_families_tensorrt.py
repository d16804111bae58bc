"""Every family lowered for TensorRT: in ONNX Runtime against the reference, and as proved engines where RTX is."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from semkv_deploy.export.decoder import ReferenceDecoder
from semkv_deploy.targets.tensorrt.lower import Lowered, lower_decoder, write_weights

NAMES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
CAPACITY = 64
TOLERANCE = {"float32": 1e-4, "float16": 5e-2}
HEADS_OF_64 = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads that have a fused kernel; the tiny ones have none."""


def lowered(path: Path, folder: Path, dtype: Any = "float32", **dims: int) -> Lowered:
    graph, _ = write_weights(path, folder, dtype)
    return lower_decoder(graph, folder / "decoder.onnx", bias="head", dims={"capacity": CAPACITY, **dims})


def folding(path: Path, run: Callable[..., Any], kv_heads: int) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Runs a lowered graph with the caches of the portable one: folded or not, and of any type, the bytes lie alike."""
    inputs = {value.name: value for value in onnx.load(path, load_external_data=False).graph.input}
    half = inputs["past_key_values.00.key"].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16

    def wrapped(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feed = dict(given)
        for name, value in inputs.items():
            if name.startswith("past_key_values.") and value.type.tensor_type.shape.dim[1].dim_value == 1:
                feed[name] = feed[name].reshape(-1, 1, *feed[name].shape[2:])
            if half and name.startswith("past_key_values."):
                feed[name] = feed[name].half()
        outputs = run(feed)
        return {
            name: tensor.float().reshape(-1, kv_heads, *tensor.shape[2:]) if name.startswith("present.") else tensor
            for name, tensor in outputs.items()
        }

    return wrapped


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_lowered_graph_agrees_with_the_reference(
    name: str, dtype: Any, exported_family: Any, open_onnx: Any, conversation: Any, tmp_path: Path
) -> None:
    """A conversation, and then caches a compressor may leave: other lengths per layer, biases, a dead slot, garbage."""
    exported = exported_family(name)
    decoder = ReferenceDecoder(exported.model)
    made = lowered(exported.path, tmp_path, dtype)
    layers, kv_heads = len(decoder.layers), decoder.layers[0].kv_heads
    run = folding(made.path, open_onnx(made.path), kv_heads)
    want, caches = conversation.play(decoder, decoder.empty_caches(2, CAPACITY), layers)
    got, ours = conversation.play(run, decoder.empty_caches(2, CAPACITY), layers)
    for row, logits in enumerate(want):
        assert (got[row] - logits).abs().max() <= TOLERANCE[dtype] * logits.abs().max()
    for cache, tensor in caches.items():
        assert (ours[cache] - tensor).abs().max() <= TOLERANCE[dtype] * max(1, tensor.abs().max()), cache

    generator = torch.Generator().manual_seed(3)
    empty = decoder.empty_caches(2, CAPACITY)
    inputs = {cache: torch.randn(tensor.shape, generator=generator) for cache, tensor in empty.items()}
    inputs["slot_bias.00"][1, :, 2] = -math.inf
    inputs["input_ids"] = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs["position_ids"] = torch.tensor([[30, 31, 32], [70, 71, 72]])
    inputs["logits_index"] = torch.tensor([[2], [0]])
    inputs["length"] = torch.tensor([[4, 9], [13, 5]])[:layers]
    expected, given = decoder(inputs), run(inputs)
    assert sorted(expected) == sorted(given)
    for output, tensor in expected.items():
        assert (tensor - given[output]).abs().max() <= TOLERANCE[dtype] * max(1, tensor.abs().max()), output


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_every_type_is_consistent(name: str, dtype: Any, exported_family: Any, tmp_path: Path) -> None:
    """ONNX's own type inference takes the converted graph: no node mixes types."""
    made = lowered(exported_family(name).path, tmp_path, dtype, batch=1)
    onnx.checker.check_model(str(made.path), full_check=True)
    graph = onnx.load(made.path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert (
        types["past_key_values.00.key"]
        == types["present.00.value"]
        == getattr(onnx.TensorProto, dtype.upper().replace("FLOAT32", "FLOAT"))
    )
    assert types["logits"] == types["slot_bias.00"] == onnx.TensorProto.FLOAT
    products = [node for node in graph.node if node.op_type == "MatMul"]
    known = onnx.shape_inference.infer_shapes(onnx.load(made.path, load_external_data=False)).graph
    inferred = {value.name: value.type.tensor_type.elem_type for value in known.value_info} | types
    assert {inferred[node.output[0]] for node in products} == {types["past_key_values.00.key"]}


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (extra `rtx`)"
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi"])
def test_bundle_of_engines_is_built_and_proved(
    name: str, build_model: Any, families: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Budget 0.2 of 8,192 tokens in float16 (Qwen2: 0.5 too), one plan each for three GPUs, decoder and compressor.

    Soft caps have no fused kernel, so that Gemma 2 is decomposed.
    """
    from transformers import AutoTokenizer

    from semkv_deploy.bundle import TensorRTRecord
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import SemantiCache
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions

    sizes = families[name].config | HEADS_OF_64 | {"vocab_size": 512, "max_position_embeddings": 8192}
    sizes |= {"head_dim": 64} if name in ("qwen3", "gemma", "gemma2") else {}
    sizes |= {"num_key_value_heads": 4} if name == "phi" else {}
    model = build_model(name, **sizes)
    model.save_pretrained(tmp_path / "checkpoint")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "checkpoint")
    capacities = {0.2: 1664, **({0.5: 4096} if name == "qwen2" else {})}
    bundle = build_bundle(
        str(tmp_path / "checkpoint"),
        tmp_path / "bundle",
        budgets=list(capacities),
        method=SemantiCache(),
        max_context=8192,
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(compute_capabilities="86,89,120"),
    )
    record, layers = bundle.target("tensorrt-rtx"), model.config.num_hidden_layers
    assert isinstance(record, TensorRTRecord) and record.compute_capabilities == [86, 89, 120]
    assert [budget.contract.capacity for budget in record.budgets] == list(capacities.values())
    attention = "MATRIX_MULTIPLY" if name == "gemma2" else "ATTENTION_INPUT"
    for budget in record.budgets:
        assert [profile.phase for profile in budget.contract.graphs[0].profiles] == ["prefill", "decode"]
        assert [graph.phase for graph in budget.contract.graphs] == ["decoder", "compressor"]
        decoder, compressor = budget.engines
        assert decoder.layers == {"KV_CACHE_UPDATE": 2 * layers, attention: layers} and compressor.layers == {}
        for engine, graph in zip(budget.engines, budget.contract.graphs, strict=True):
            assert graph.plan is not None and (bundle.root / graph.plan).stat().st_size == engine.bytes > 0

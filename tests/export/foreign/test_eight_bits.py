"""What onnxruntime's quantisers make of a decoder: imported, its weights kept, or refused by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from semkv_deploy import validate_bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder
from semkv_deploy.export.foreign.eight_bits import float_attention, unsigned_activations
from semkv_deploy.methods import METHODS
from semkv_deploy.targets.tensorrt.build import TensorRTOptions

from .conftest import GenaiExported, TorchExported

Quantised = Callable[[str], Path]


class Batches(CalibrationDataReader):
    """Two prompts on a past."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        past = {f"past_key_values.0.{kind}": np.zeros((1, 2, 16, 8), np.float32) for kind in ("key", "value")}
        tokens = {"attention_mask": np.ones((1, 32), np.int64), "position_ids": np.arange(16, 32)[None]}
        self._left = [{"input_ids": random.integers(0, 512, (1, 16)), **tokens, **past} for _ in range(2)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


def static(source: Path, out: Path, **options: Any) -> None:
    quantize_static(str(source), out, Batches(), **{"op_types_to_quantize": ["MatMul"], **options})


def blocks(source: Path, out: Path, bits: int, form: Any) -> None:
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits, quant_format=form)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, out)


QUANTISERS: dict[str, Callable[[Path, Path], None]] = {
    "dynamic": lambda source, out: quantize_dynamic(str(source), out, weight_type=QuantType.QInt8),
    "dynamic by channel": lambda source, out: quantize_dynamic(
        str(source), out, weight_type=QuantType.QUInt8, per_channel=True
    ),
    "static": lambda source, out: static(source, out, quant_format=QuantFormat.QDQ),
    "static uint8": lambda source, out: static(source, out, activation_type=QuantType.QUInt8),
    "blocks of 4 bits": lambda source, out: blocks(source, out, 4, QuantFormat.QDQ),
    "blocks of 8 bits": lambda source, out: blocks(source, out, 8, QuantFormat.QOperator),
    "static everywhere": lambda source, out: static(source, out, op_types_to_quantize=None),
    "in integers": lambda source, out: static(source, out, quant_format=QuantFormat.QOperator),
}
READ_BY = {
    "dynamic": {"MatMulInteger", "DequantizeLinear"},
    "dynamic by channel": {"MatMulInteger", "DequantizeLinear"},
    "static": {"DequantizeLinear"},
    "static uint8": {"DequantizeLinear"},
    "blocks of 4 bits": {"DequantizeLinear"},
    "blocks of 8 bits": {"MatMulNBits"},
}


@pytest.fixture(scope="module")
def quantised(torch_exported: TorchExported, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """`quantised(quantiser)`: the graph, when first asked for."""
    logging.getLogger().setLevel(logging.ERROR)  # it asks for preprocessing
    source = torch_exported("llama", max_position_embeddings=512)
    whole = tmp_path_factory.mktemp("whole") / "whole.onnx"
    onnx.save(onnx.load(source), whole)

    @functools.cache
    def quantise(name: str) -> Path:
        folder = tmp_path_factory.mktemp("quantised")
        for path in source.parent.iterdir():
            if not path.name.startswith("model.onnx"):
                (folder / path.name).write_bytes(path.read_bytes())
        QUANTISERS[name](whole, folder / "model.onnx")
        return folder / "model.onnx"

    return quantise


def integers(model: onnx.ModelProto) -> set[bytes]:
    """Matrices of integers, as bytes."""
    held = [tensor for tensor in model.graph.initializer if tensor.data_type != TensorProto.INT64]
    whole = [tensor for tensor in held if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    return {numpy_helper.to_array(each).tobytes() for each in whole if len(each.dims) > 1}


@pytest.mark.parametrize("name", READ_BY)
def test_import_is_proved_and_weights_are_kept(name: str, quantised: Quantised, tmp_path: Path):
    source = quantised(name)
    import_decoder(source, tmp_path)
    model, original = onnx.load(tmp_path / "decoder.onnx"), onnx.load(source)
    kinds = {node.op_type for node in model.graph.node}
    assert READ_BY[name] <= kinds and "NexusAttention" in kinds and "Softmax" not in kinds
    assert integers(model) == integers(original) and len(integers(original)) > 6


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_it_is_built_and_valid(name: str, quantised: Quantised, tmp_path: Path):
    options: dict[str, Any] = {"weights": "fp32", "native": "off", "max_context": 512}
    method = METHODS["importance"]()
    bundle = build_bundle(quantised(name), tmp_path / "bundle", method=method, budgets=[0.3, 1.0], **options)
    assert bundle.target("onnxruntime-cpu").weights == "kept"
    report = validate_bundle(bundle.root, tokens=250)
    assert report.passed, [result for result in report.results if result.status == "failed"]


@pytest.mark.parametrize(("name", "operator"), [("dynamic", "MatMulInteger|DequantizeLinear"), ("static", "Dequant")])
def test_tensorrt_is_refused_by_the_operators_name(name: str, operator: str, quantised: Quantised, tmp_path: Path):
    said = rf"TensorRT targets take no weights that came quantised .*--target|weights that ({operator}).* reads"
    with pytest.raises(SemkvError, match=said) as refused:
        build_bundle(
            quantised(name),
            tmp_path / "bundle",
            method=METHODS["full"](),
            budgets=[1.0],
            target=["tensorrt-rtx"],
            tensorrt=TensorRTOptions(engines=False),
        )
    assert "--target tensorrt-rtx" in str(refused.value) and "weights that" in str(refused.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "static everywhere",
            r"a cache that the graph rounds to 8 bits .*past_key_values.0.*op_types_to_quantize",
        ),
        ("in integers", "a product in integers that the importer does not know .*got QLinearMatMul.*QuantFormat.QDQ"),
    ],
)
def test_what_is_not_known_is_refused(name: str, said: str, quantised: Quantised, tmp_path: Path):
    with pytest.raises(SemkvError, match=said):
        import_decoder(quantised(name), tmp_path)


def test_eight_bits_of_genais_builder(genai_exported: GenaiExported, tmp_path: Path):
    pytest.importorskip("onnxruntime_genai")
    source = genai_exported("int8") / "model.onnx"
    import_decoder(source, tmp_path)
    model = onnx.load(tmp_path / "decoder.onnx")
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert {helper.get_node_attr_value(node, "bits") for node in products} == {8}
    assert integers(model) == integers(onnx.load(source))


def rounded(zero: np.ndarray, after: str) -> onnx.ModelProto:
    """A pair that rounds, its zero given, and a node that moves what came of it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="d"),
        helper.make_node(after, ["d"], ["y"], name="after"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b"]) for name in "xy"]
    held = [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(zero, "zero")]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_int8_activations_become_uint8_of_the_same_values():
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32) * 4
    proto = rounded(np.int8(-3), "Neg")
    model = ir.from_proto(proto)
    assert unsigned_activations(model.graph) == 1
    found = ir.to_proto(model)
    assert {tensor.data_type for tensor in found.graph.initializer if tensor.name in found.graph.node[0].input} == {
        TensorProto.FLOAT,
        TensorProto.UINT8,
    }
    np.testing.assert_array_equal(run(found, x), run(proto, x))
    moved = ir.from_proto(rounded(np.int8(-3), "Transpose"))
    unsigned_activations(moved.graph)
    assert run(ir.to_proto(moved), x).shape == (7, 5), "which ONNX Runtime does not load with int8"


def test_uint8_activations_stay():
    assert unsigned_activations(ir.from_proto(rounded(np.uint8(3), "Neg")).graph) == 0


def test_products_of_two_activations_lose_their_rounding_and_products_by_weights_do_not():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["xq"], name="xq"),
        helper.make_node("DequantizeLinear", ["xq", "scale"], ["xd"], name="xd"),
        helper.make_node("DequantizeLinear", ["w", "scale"], ["wd"], name="wd"),
        helper.make_node("MatMul", ["xd", "wd"], ["by_weights"], name="by_weights"),
        helper.make_node("MatMul", ["xd", "by_weights"], ["p"], name="of_two"),
        helper.make_node("QuantizeLinear", ["p", "scale"], ["pq"], name="pq"),
        helper.make_node("DequantizeLinear", ["pq", "scale"], ["y"], name="pd"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy"]
    held = [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(np.eye(4, dtype=np.uint8), "w")]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], held)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert float_attention(model.graph) == 1
    by_name = {node.name: node for node in model.graph}
    assert by_name["by_weights"].inputs[0] is by_name["xd"].outputs[0]
    assert by_name["of_two"].inputs[0] is model.graph.inputs[0]
    assert model.graph.outputs[0] is by_name["of_two"].outputs[0]

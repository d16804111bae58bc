"""Float16 graphs: read as float32, compared with what they were, built and valid; or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from semkv_deploy import open_bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder, recognised
from semkv_deploy.export.foreign.float16 import is_float16, widen
from semkv_deploy.methods import METHODS

from .conftest import GenaiExported, TorchExported
from .test_families import Row, check

# The parser takes float16 by its bits: 0.5 and 2.
SOURCE = """
<ir_version: 10, opset_import: ["": 21]>
half (float16[n, 4] x, float16[n, 4] past) => (float16[n, 4] y, float16[m, 4] present)
{
  wide = Cast <to = 1> (x)
  square = Mul (wide, wide)
  narrow = Cast <to = 10> (square)
  small = Constant <value = float16[1] {14336}> ()
  shape = Shape (x)
  filled = ConstantOfShape <value = float16[1] {16384}> (shape)
  scaled = Mul (narrow, small)
  moved = Add (scaled, filled)
  product = Mul (moved, weight)
  again = Cast <to = 1> (product)
  y = Cast <to = 10> (again)
  present = Concat <axis = 0> (past, moved)
}
"""

WEIGHT = np.array([0.1, 0.25, -3, 7], np.float16)


def half() -> onnx.ModelProto:
    proto = parser.parse_model(SOURCE)
    proto.graph.initializer.append(numpy_helper.from_array(WEIGHT, "weight"))
    return proto


def run(model: onnx.ModelProto, dtype: type, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(None, {"x": x.astype(dtype), "past": x.astype(dtype)})]


def test_a_float16_graph_is_the_same_in_float32():
    proto = half()
    model = ir.from_proto(proto)
    assert is_float16(model)
    widen(model, "half.onnx")
    wide = ir.to_proto(model)
    assert not is_float16(ir.from_proto(wide))
    assert [node.op_type for node in wide.graph.node].count("Cast") == 0
    assert [each.name for each in wide.graph.output] == ["y", "present"]
    (weight,) = wide.graph.initializer
    stored = numpy_helper.to_array(weight)
    assert stored.dtype == np.float32
    assert (stored == WEIGHT.astype(np.float32)).all(), "kept exactly"
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)
    for narrow, found in zip(run(proto, np.float16, x), run(wide, np.float32, x), strict=True):
        assert narrow.dtype == np.float16 and found.dtype == np.float32
        np.testing.assert_allclose(found, narrow.astype(np.float32), rtol=4e-3)


def test_float32_graphs_are_not_touched():
    proto = parser.parse_model(SOURCE.replace("float16[", "float[").replace("to = 10", "to = 1"))
    assert not is_float16(ir.from_proto(proto))


def test_functions_of_its_own_are_refused():
    proto = half()
    body = helper.make_function("own", "twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
                                [helper.make_opsetid("", 21)])  # fmt: skip
    proto.functions.append(body)
    with pytest.raises(SemkvError, match=r"half.onnx: a float16 graph with functions of its own .*twice.*[Ii]nline"):
        widen(ir.from_proto(proto), "half.onnx")


@pytest.fixture(params=["torch", "genai-cpu", "genai-cuda", "genai-dml"])
def source(request: pytest.FixtureRequest, torch_exported: TorchExported, genai_exported: GenaiExported) -> Path:
    """MatMul and Softmax; MultiHeadAttention; GroupQueryAttention with rotary inside and outside."""
    if request.param == "torch":
        return torch_exported("llama", half=True, max_position_embeddings=512)
    pytest.importorskip("onnxruntime_genai")
    return genai_exported("fp16", request.param.removeprefix("genai-")) / "model.onnx"


def test_import_is_proved_against_the_original(source: Path, tmp_path: Path):
    said: list[str] = []
    facts = import_decoder(source, tmp_path, progress=lambda what, share: said.append(what))
    assert facts.rotary is not None
    assert any("read as float32: twice the bytes" in each for each in said)
    (apart,) = [each for each in said if "float32 and float16 are apart by" in each]
    assert 0 < float(apart.split()[6]) < 1e-2
    assert str(recognised(source)).endswith("; float16, read as float32")
    model = onnx.load(tmp_path / "decoder.onnx")
    assert not is_float16(ir.from_proto(model))
    kinds = {node.op_type for node in model.graph.node}
    assert "NexusAttention" in kinds and not kinds & {"GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding"}
    assert not list(tmp_path.glob("widened*"))
    theirs = {numpy_helper.to_array(each).astype(np.float32).tobytes() for each in onnx.load(source).graph.initializer}
    ours = [numpy_helper.to_array(each) for each in model.graph.initializer]
    weights = [each for each in ours if each.dtype == np.float32 and each.ndim == 2 and min(each.shape) > 8]
    assert len(weights) > 6 and all(each.tobytes() in theirs for each in weights), "values are kept exactly"


@pytest.mark.parametrize("source", ["torch", "genai-cuda"], indirect=True)
def test_it_is_built_and_valid(source: Path, request: pytest.FixtureRequest, tmp_path: Path):
    check(source, Row({}, 8 if "torch" in request.node.callspec.id else 16), tmp_path)


@pytest.mark.parametrize("source", ["genai-cuda"], indirect=True)
def test_its_weights_are_quantised_as_others_are(source: Path, tmp_path: Path):
    sizes: dict[str, int] = {}
    for weights in ("fp32", "int4"):
        options: dict[str, Any] = {
            "method": METHODS["importance"](),
            "budgets": [0.5],
            "weights": weights,
            "native": "off",
            "max_context": 512,
        }
        build_bundle(source, tmp_path / weights, **options)
        assert open_bundle(tmp_path / weights).target("onnxruntime-cpu").weights == weights
        folder = tmp_path / weights / "targets" / "onnxruntime-cpu"
        sizes[weights] = sum(path.stat().st_size for path in folder.glob("decode*.data"))
    narrow = source.with_name("model.onnx.data").stat().st_size
    assert sizes["fp32"] > 1.8 * narrow and sizes["int4"] < narrow


@pytest.mark.parametrize("source", ["torch"], indirect=True)
def test_the_comparison_with_float16_can_fail(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from semkv_deploy.export.foreign import float16

    whole: Callable[..., Any] = float16._widened

    def off(tensor: ir.TensorProtocol) -> Any:
        made = whole(tensor).numpy()
        return ir.Tensor(made * np.float32(1.2 if made.ndim == 2 and made.shape[0] == 512 else 1), name=tensor.name)

    monkeypatch.setattr(float16, "_widened", off)
    with pytest.raises(SemkvError, match="the graph in float32 is not what it was in float16"):
        import_decoder(source, tmp_path)


@pytest.mark.parametrize("source", ["torch"], indirect=True)
def test_a_graph_that_overflows_says_so(source: Path, tmp_path: Path):
    """As float16 does in some models; the float32 graph is another then."""
    (tmp_path / "out").mkdir()
    shutil.copytree(source.parent, tmp_path / "source")
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and list(tensor.dims) == [512, 32]:
            tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, 6e4, np.float16), tensor.name))
    onnx.save(model, tmp_path / "source" / "model.onnx")
    with pytest.raises(SemkvError, match=r"numbers are not finite.*Float16 overflows in some models"):
        import_decoder(tmp_path / "source" / "model.onnx", tmp_path / "out")

"""A mixture of experts in one node: taken where the target has it, refused by its name where it has not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from semkv_deploy import validate_bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import METHODS
from semkv_deploy.targets.tensorrt.build import TensorRTOptions

from .conftest import TorchExported
from .test_multi_head import add, constant

HIDDEN, WIDE, EXPERTS = 32, 48, 4


def with_experts(source: Path, place: Path) -> Path:
    """The decoder with a com.microsoft::MoE behind its last norm, as onnxruntime-genai's builder writes it."""
    shutil.copytree(source.parent, place)
    model = onnx.load(source, load_external_data=False)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    graph, random = model.graph, np.random.default_rng(0)
    (head,) = [node for node in graph.node if "logits" in node.output]
    for name, shape in (
        ("router", (HIDDEN, EXPERTS)),
        ("up", (EXPERTS, WIDE, HIDDEN)),
        ("down", (EXPERTS, HIDDEN, WIDE)),
    ):
        constant(graph, name, random.standard_normal(shape).astype(np.float32) * 0.3)
    constant(graph, "tokens", np.array([-1, EXPERTS]))
    states = head.input[0]
    routed = add(graph, head, "MatMul", [states, "router"], "routed")
    shares = add(graph, head, "Reshape", [routed, "tokens"], "shares")
    mixed = add(
        graph,
        head,
        "MoE",
        [states, shares, "up", "", "down"],
        "mixed",
        domain="com.microsoft",
        k=2,
        activation_type="silu",
    )
    head.input[0] = add(graph, head, "Add", [states, mixed], "with_experts")
    (place / source.name).write_bytes(model.SerializeToString())
    return place / source.name


@pytest.fixture
def source(torch_exported: TorchExported, tmp_path: Path) -> Path:
    return with_experts(torch_exported("llama", max_position_embeddings=512), tmp_path / "source")


def test_onnx_runtime_takes_it(source: Path, tmp_path: Path):
    options = {"weights": "fp32", "native": "off", "max_context": 512}
    bundle = build_bundle(source, tmp_path / "bundle", method=METHODS["importance"](), budgets=[0.3, 1.0], **options)
    assert validate_bundle(bundle.root, tokens=250).passed


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensorrt_refuses_it_by_name(dtype: str, source: Path, tmp_path: Path):
    options = TensorRTOptions(dtype=dtype, engines=False, compute_capabilities="86")
    with pytest.raises(SemkvError, match=r"mixed.node.*MoE"):
        build_bundle(
            source,
            tmp_path / "bundle",
            method=METHODS["full"](),
            budgets=[1.0],
            target=["tensorrt-rtx"],
            tensorrt=options,
        )
    assert not (tmp_path / "bundle").exists()

"""The implementations of an operator, run on the same torch tensors: torch, ONNX Runtime, ONNX's own evaluator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from semkv_deploy import ops
from semkv_deploy.ops import semantic_cluster
from semkv_deploy.ops.spec import OperatorSpec, make_node
from semkv_deploy.passes import static_cluster

ELEMENT_TYPE = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}
FIXED_TYPE = {
    "float32": onnx.TensorProto.FLOAT,
    "int64": onnx.TensorProto.INT64,
    "int8": onnx.TensorProto.INT8,
    "float8e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
}

STATIC_CLUSTER = "onnxruntime, the body for TensorRT"

Outputs = tuple[Tensor, ...]
Implementation = Callable[..., Outputs]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


def build_model(
    spec: OperatorSpec,
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, ...]] | None,
    attributes: dict[str, float],
    function: onnx.FunctionProto | None = None,
) -> onnx.ModelProto:
    """A model of one node and the operator's function (None: the portable one).

    sizes: static input shapes; None: all dimensions symbolic.
    """

    def values(
        tensors: Sequence[ops.TensorSpec], shapes: Sequence[tuple[int, ...]] | None
    ) -> list[onnx.ValueInfoProto]:
        return [
            onnx.helper.make_tensor_value_info(
                t.name, FIXED_TYPE.get(t.dtype, ELEMENT_TYPE[dtype]), shapes[i] if shapes else t.dims
            )
            for i, t in enumerate(tensors)
        ]

    function = function or next(f for f in ops.function_protos() if f.name == spec.name)
    node = make_node(spec, spec.input_names, spec.output_names, "", **attributes)
    named = (
        {}
        if sizes is None
        else {d: n for t, s in zip(spec.inputs, sizes, strict=True) for d, n in zip(t.dims, s, strict=True)}
    )
    named |= {key: int(value) for key, value in {**spec.attributes, **attributes}.items()}
    outputs = None if sizes is None else [tuple(named[d] for d in t.dims) for t in spec.outputs]
    graph = onnx.helper.make_graph([node], spec.name, values(spec.inputs, sizes), values(spec.outputs, outputs))
    opsets = [onnx.helper.make_opsetid("", ops.OPSET), onnx.helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


def open_session(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=64)
def _runner(
    kind: str,
    name: str,
    dtype: torch.dtype,
    sizes: tuple[tuple[int, ...], ...] | None,
    attributes: tuple[tuple[str, float], ...],
) -> onnxruntime.InferenceSession | ReferenceEvaluator:
    function = static_cluster.function_proto() if kind == STATIC_CLUSTER else None
    model = build_model(ops.SPECS[name], dtype, sizes, dict(attributes), function)
    return ReferenceEvaluator(model) if kind == "evaluator" else open_session(model)


def _onnx(kind: str, module: ModuleType, static: bool = False) -> Implementation:
    def run(*inputs: Tensor, **attributes: float) -> Outputs:
        sizes = tuple(tuple(t.shape) for t in inputs) if static else None
        runner = _runner(kind, module.OP.name, inputs[0].dtype, sizes, tuple(sorted(attributes.items())))
        feed = {name: t.numpy() for name, t in zip(module.OP.input_names, inputs, strict=True)}
        return tuple(torch.from_numpy(np.array(array)) for array in runner.run(None, feed))

    return run


def _torch(module: ModuleType) -> Implementation:
    module.register_torch()
    operator = getattr(torch.ops.semkv, module.OP.torch_name)

    def run(*inputs: Tensor, **attributes: float) -> Outputs:
        outputs = operator(*inputs, **attributes)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    return run


def implementations(module: ModuleType) -> dict[str, Implementation]:
    """Every implementation of the operator, by name; the torch operator comes first."""
    found = {
        "torch": _torch(module),
        "onnxruntime": _onnx("onnxruntime", module),
        "onnxruntime, static shapes": _onnx("onnxruntime", module, static=True),
        "ReferenceEvaluator": _onnx("evaluator", module),
    }
    return {**found, STATIC_CLUSTER: _onnx(STATIC_CLUSTER, module)} if module is semantic_cluster else found


def assert_agree(module: ModuleType, inputs: Sequence[Tensor], atol: float, **attributes: float) -> Outputs:
    """Run every implementation, compare every output with torch's, and return torch's.

    Floats: within atol, or relatively within atol (infinities equal); integers: equal.
    """
    expected: Outputs = ()
    for kind, run in implementations(module).items():
        before = [t.clone() for t in inputs]
        got = run(*inputs, **attributes)
        for name, tensor, copy in zip(module.OP.input_names, inputs, before, strict=True):
            assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()), f"{kind} wrote to its input {name}"
        expected = expected or got
        for name, a, b in zip(module.OP.output_names, expected, got, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, (kind, name)
            try:
                torch.testing.assert_close(b, a, atol=atol, rtol=atol)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {name}: {error}") from None
    return expected

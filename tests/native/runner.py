"""Runs one node of libsemkv_onnxruntime.so in ONNX Runtime, with outputs in their inputs' buffers or copied."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from semkv_deploy.ops import DOMAIN, native
from semkv_deploy.ops import SPECS as PORTABLE

SPECS = {**PORTABLE, **native.SPECS}

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.int64: TensorProto.INT64,
}


@functools.cache
def session_of(
    library: Path,
    operator: str,
    options: tuple[str, ...],
    types: tuple[torch.dtype, ...],
    attributes: tuple[tuple[str, float], ...],
    threads: int,
) -> onnxruntime.InferenceSession:
    """A session of a model with the one node; `types` are those of inputs, then outputs."""
    spec = SPECS[operator].with_options(*options)
    name = "_".join((operator, *options))
    node = helper.make_node(name, spec.input_names, spec.output_names, domain=DOMAIN, **dict(attributes))
    infos = [
        helper.make_tensor_value_info(tensor.name, ONNX_TYPES[dtype], [None] * len(tensor.dims))
        for tensor, dtype in zip((*spec.inputs, *spec.outputs), types, strict=True)
    ]
    count = len(spec.inputs)
    graph = helper.make_graph([node], "node", infos[:count], infos[count:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ort_value(tensor: Tensor) -> Any:
    """An OrtValue over the tensor's memory."""
    assert tensor.is_contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def run_node(
    library: Path,
    operator: str,
    options: tuple[str, ...],
    inputs: Sequence[Tensor],
    outputs: Mapping[str, Tensor],
    *,
    in_place: bool = True,
    threads: int = 2,
    **attributes: float,
) -> list[Tensor]:
    """The node's outputs. `outputs` are buffers for those that continue no input; inputs are left as they are."""
    spec = SPECS[operator].with_options(*options)
    given = dict(zip(spec.input_names, (t.clone() for t in inputs), strict=True))
    results = {}
    for name in spec.output_names:
        source = name.removesuffix("_out")
        if name in outputs:
            results[name] = outputs[name]
        else:
            results[name] = given[source] if in_place else torch.full_like(given[source], 7)
    types = tuple(t.dtype for t in (*given.values(), *results.values()))
    session = session_of(library, operator, options, types, tuple(sorted(attributes.items())), threads)
    binding = session.io_binding()
    held = []
    for name, tensor in given.items():
        held.append(ort_value(tensor))
        binding.bind_ortvalue_input(name, held[-1])
    for name, tensor in results.items():
        held.append(ort_value(tensor))
        binding.bind_ortvalue_output(name, held[-1])
    session.run_with_iobinding(binding)
    return [results[name] for name in spec.output_names]


def native_attention(library: Path, inputs: Sequence[Tensor], *options: str, **settings: Any) -> list[Tensor]:
    """NexusAttention's outputs, output and attention mass poisoned before the run."""
    fresh = {"output": torch.full_like(inputs[0], float("nan"))}
    if "mass" in options:
        fresh["attention_mass"] = torch.full(inputs[5].shape, float("nan"))
    return run_node(library, "NexusAttention", options, inputs, fresh, **settings)

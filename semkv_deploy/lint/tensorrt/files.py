"""Rules about the model as a whole: opset, element types and dynamic axes of its inputs, weights in other files."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from semkv_deploy.graph.external_data import external_faults
from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt.view import Rule, View

OLDEST_OPSET = 7
"""Older ones are taken with a warning. Newer ones (tried up to 40) and any IR version (up to 20) are taken."""

BOUND = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "INT4", "INT32", "INT64", "UINT8", "BOOL", "FLOAT8E4M3FN")


def old_opset(view: View) -> Iterator[Finding]:
    """A warning: "TensorRT supports ONNX graphs generated with at least opset 7 […] not guaranteed to work"."""
    for entry in view.model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < OLDEST_OPSET:
            what = f"opset {entry.version} is older than {OLDEST_OPSET}, the oldest that is supported"
            yield Finding("model", what, "convert it with onnx.version_converter", "unverified")


def dynamic_input(view: View) -> Iterator[Finding]:
    """Without a profile: "Network has dynamic or shape inputs, but no optimization profile has been defined"."""
    names = []
    for value in view.model.graph.input:
        known = view.types.get(value.name)
        shape = known.shape if known is not None and value.name in view.inputs else None
        if any(not isinstance(size, int) for size in shape or ()):
            names.append(value.name)
    if names:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        fix = "define an optimization profile, or give static shapes"
        yield Finding("model", f"dynamic inputs need an optimization profile: {listed}", fix, "unverified")


def input_type(view: View) -> Iterator[Finding]:
    """Refused are int16, uint16, uint32, uint64, uint4, strings, complex numbers: "Unsupported ONNX data type"."""
    for value in [*view.model.graph.input, *view.model.graph.output]:
        element = value.type.tensor_type.elem_type
        name = onnx.TensorProto.DataType.Name(element)
        if element and name not in BOUND:
            yield Finding(value.name, f"{name.lower()} is refused", "use int32, int64 or a float type", "blocked")


def double_input(view: View) -> Iterator[Finding]:
    """A double becomes float32, bindings included: a host's doubles are other numbers."""
    for value in [*view.model.graph.input, *view.model.graph.output]:
        if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            fix = "declare it float32"
            yield Finding(value.name, "double is bound as float32: a host's 8-byte numbers are misread", fix, "wrong")


def external_data(view: View) -> Iterator[Finding]:
    """Weights in other files: relative, not above the model, there, long enough and as long as their type and shape."""
    for name, fault in external_faults(view.model, view.folder):
        yield Finding(name, fault, "keep the model and its data together, or export again", "blocked")


RULES: list[Rule] = [old_opset, dynamic_input, input_type, double_input, external_data]

"""Rules about the model as a whole: opset, element types and dynamic axes of its inputs, weights in other files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx

from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt.view import Rule, View

OLDEST_OPSET = 7
"""Older ones are taken with a warning. Newer ones (tried up to 40) and any IR version (up to 20) are taken."""

BOUND = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "INT4", "INT32", "INT64", "UINT8", "BOOL", "FLOAT8E4M3FN")
BYTES = {4: 2, 5: 2, 1: 4, 6: 4, 7: 8, 10: 2, 11: 8, 16: 2}
"""Bytes an element, by type, where not 1; packed types are not checked."""


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
    reported = set()
    for tensor in view.model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        record = {entry.key: entry.value for entry in tensor.external_data}
        fault = _fault(record, tensor, view.folder)
        if fault is not None and (key := (record.get("location"), fault)) not in reported:
            reported.add(key)
            yield Finding(tensor.name, fault, "keep the model and its data together, or export again", "blocked")


def _fault(record: dict[str, str], tensor: onnx.TensorProto, folder: Path | None) -> str | None:
    location = record.get("location", "")
    if not location:
        return "external data without a location"
    if PurePosixPath(location).is_absolute():
        return f"external data at an absolute path ({location}) is refused"
    depth = 0
    for part in PurePosixPath(location).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return f"external data above the model's folder ({location}) is refused"
    size = BYTES.get(tensor.data_type, 1)
    for dim in tensor.dims:
        size *= dim
    for key in ("offset", "length"):
        given = record.get(key) or "0"
        if not (given.isascii() and given.isdigit()):
            return f"external data with {key} {given!r}, which is no number of bytes"
    offset, length = int(record.get("offset") or 0), int(record.get("length") or size)
    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)
    if not packed and length != size:
        return f"external data of {length} bytes for a tensor of {size}"
    if folder is None:
        return None
    path = folder / location
    if not path.is_file():
        return f"external data is missing: {location}"
    if path.stat().st_size < offset + length:
        return f"external data is truncated: {location} has {path.stat().st_size} bytes, {offset + length} are needed"
    return None


RULES: list[Rule] = [old_opset, dynamic_input, input_type, double_input, external_data]

"""Weights in files beside a graph: whether each is where the graph says, within its folder, whole and of its type."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from semkv_deploy.graph.external import tensors

if TYPE_CHECKING:
    import onnx

BYTES = {4: 2, 5: 2, 1: 4, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}
"""Bytes an element, by `TensorProto` type, where not 1."""

PACKED = (21, 22, 23, 25, 26)
"""Types of less than a byte an element: their sizes are not checked."""

_LARGEST = 1 << 62


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors whose data is in another file, in subgraphs, attributes and functions too."""
    import onnx

    return (tensor for tensor in tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL)


def external_faults(model: onnx.ModelProto, folder: Path | None) -> Iterator[tuple[str, str]]:
    """What is wrong with external data, as (name of the tensor, fault), each fault of a file once.

    Args:
        folder: of the graph's file; None: only what the graph alone says is looked at.
    """
    reported = set()
    for tensor in external_tensors(model):
        record = {entry.key: entry.value for entry in tensor.external_data}
        fault = _fault(record, tensor, folder)
        if fault is not None and (key := (record.get("location"), fault)) not in reported:
            reported.add(key)
            yield tensor.name, fault


def _fault(record: dict[str, str], tensor: onnx.TensorProto, folder: Path | None) -> str | None:
    location = record.get("location", "")
    if not location:
        return "external data without a location"
    if PurePosixPath(location).is_absolute() or location[1:3] in (":\\", ":/"):
        return f"external data at an absolute path ({location}) is refused"
    depth = 0
    for part in PurePosixPath(location.replace("\\", "/")).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return f"external data above the model's folder ({location}) is refused"
    if "\0" in location or depth == 0:
        return f"external data at no file's name ({location!r})"
    size = BYTES.get(tensor.data_type, 1)
    for dim in tensor.dims:
        if dim < 0:
            return f"external data for a tensor of negative size ({list(tensor.dims)})"
        size *= dim
    for key in ("offset", "length"):
        given = record.get(key) or "0"
        if not (given.isascii() and given.isdigit() and len(given) < 20 and int(given) < _LARGEST):
            return f"external data with {key} {given[:40]!r}, which is no number of bytes"
    offset, length = int(record.get("offset") or 0), int(record.get("length") or size)
    if tensor.data_type not in PACKED and length != size:
        return f"external data of {length} bytes for a tensor of {size}"
    if folder is None:
        return None
    path = folder / location
    if not path.is_file():
        return f"external data is missing: {location}"
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"external data outside the model's folder ({location} is a link) is refused"
    if path.stat().st_size < offset + length:
        return f"external data is truncated: {location} has {path.stat().st_size} bytes, {offset + length} are needed"
    return None

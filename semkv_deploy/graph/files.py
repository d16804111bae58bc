"""Write an ONNX model to disk so that the same model gives the same bytes: one graph file, one external-data file."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

ALIGNMENT = 4096
"""Bytes: where external tensors start, so that runtimes can map each of them by itself."""

INLINE_LIMIT = 1024
"""Bytes: tensors smaller than this stay in the graph file."""


def write_model(model: ir.Model, path: Path, *, alignment: int = ALIGNMENT) -> Path:
    """Writes `path` and, beside it, `path` + ".data" with every tensor of `INLINE_LIMIT` bytes or more.

    Tensors are written in the order of the graph's initialisers, one at a time. The external file is named relative
    to the graph; an existing one is replaced. Afterwards the model's tensors refer to the file.

    Args:
        alignment: every tensor in the file starts at a multiple of so many bytes.

    Returns:
        The file of weights.
    """
    location = f"{path.name}.data"
    data = path.parent / location
    with data.open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < INLINE_LIMIT:
                continue
            file.write(bytes(-file.tell() % alignment))
            offset = file.tell()
            tensor.tofile(file)  # type: ignore[attr-defined]  # every class has it, the protocol not
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=path.parent,
            )
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))
    return data

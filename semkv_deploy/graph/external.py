"""External data: which files an ONNX graph names for its tensors, and how a file is opened that somebody else named."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

INLINE_LIMIT = 1024
"""Bytes: smaller tensors stay in the graph's file."""


class ExternalTensor(NamedTuple):
    """A tensor whose data lie in a file: name of the tensor, file relative to the graph's folder, place in bytes.

    length: None: the file's rest.
    """

    tensor: str
    location: str
    offset: int
    length: int | None


def external_tensors(model: onnx.ModelProto) -> Iterator[ExternalTensor]:
    """Every external tensor: initializers, attributes, those of subgraphs and of functions.

    Raises:
        SemkvError: when one names no file, or its place is no number.
    """
    import onnx

    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        record = {entry.key: entry.value for entry in tensor.external_data}
        try:
            offset = int(record.get("offset") or 0)
            length = int(record["length"]) if record.get("length") else None
        except ValueError:
            offset, length = -1, None
        if offset < 0 or (length is not None and length < 0) or not record.get("location"):
            raise SemkvError("external data has no valid place", where=f"tensor {tensor.name}", got=record)
        yield ExternalTensor(tensor.name, record["location"], offset, length)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, in subgraphs, attributes, functions and sparse tensors too."""
    pending: list[onnx.GraphProto] = [model.graph, *(info.algorithm for info in model.training_info)]
    pending += [info.initialization for info in model.training_info]
    nodes = [node for function in model.functions for node in function.node]
    while pending or nodes:
        if pending:
            graph = pending.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        while nodes:
            for attribute in nodes.pop().attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for value in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (value.values, value.indices)
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending += attribute.graphs


def check_text(message: Message) -> None:
    """Compares the type of every text in a parsed message: protobuf gives bytes for one that is not UTF-8.

    Raises:
        DecodeError: when one is not text.
    """
    from google.protobuf.message import DecodeError

    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for each in value if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (value,):
            if field.type == field.TYPE_MESSAGE:
                check_text(each)
            elif not isinstance(each, str):
                raise DecodeError(f"{field.full_name} is not UTF-8")


def read_graph(path: Path, *, expected: str, fix: str) -> onnx.ModelProto:
    """An ONNX file without its external data.

    Args:
        expected: what should be at `path`, where there is no file.
        fix: what to do when the file is no ONNX model.

    Raises:
        SemkvError: when the file is missing or no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise SemkvError("no such file", where=path, expected=expected, fix="check the path")
    try:
        model = onnx.load(path, load_external_data=False)
        check_text(model)
        valid = bool(model.graph.node) and bool(model.opset_import)
    except DecodeError:
        valid = False
    if not valid:
        raise SemkvError("not an ONNX model", where=path, fix=fix)
    return model


def save_with_data(model: onnx.ModelProto, path: Path) -> Path:
    """Writes a model and, beside it, `path` + ".data" with its initializers of `INLINE_LIMIT` bytes or more.

    onnx's own way to do both refuses a file of that name in the *current* directory, where a user may have an export.

    Returns:
        The file of weights.
    """
    import onnx

    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= INLINE_LIMIT:
            onnx.external_data_helper.set_external_data(tensor, data.name)
    onnx.save(model, path)
    return data


def is_inside(location: str) -> bool:
    """Whether a path with slashes stays where it starts: no root, no `..`, nothing that a file system reads oddly."""
    path = PurePosixPath(location)
    plain = location.isprintable() and "\\" not in location and ":" not in location
    return plain and not path.is_absolute() and ".." not in path.parts and path.as_posix() == location != "."


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Opens a file below `folder` for reading: a regular one, reached without a link below `folder`.

    Raises:
        SemkvError: when it is a link, is reached through one, or is no regular file.
        FileNotFoundError: when there is none.
    """
    *folders, last = name.split("/")
    # Links are refused by the system while it opens, so that nothing can be put there between a look and the opening;
    # and opening a pipe does not wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    held = [os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)]
    try:
        for part in folders:
            held.append(os.open(part, flags | os.O_DIRECTORY, dir_fd=held[-1]))
        descriptor = os.open(last, flags | os.O_NONBLOCK, dir_fd=held[-1])
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise
        raise SemkvError("is a link or no regular file", where=folder / name, fix="put the file itself there") from None
    finally:
        for each in held:
            os.close(each)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SemkvError("is no regular file", where=folder / name, fix="put the file itself there")
    return os.fdopen(descriptor, "rb")

"""A bundle's graphs: read with the weights they name, and compared with what their contracts say about them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.bundle.files import REBUILD, BundleFiles
from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import check_text, external_tensors, is_inside

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

    import onnx

    from semkv_deploy.bundle.contract import GraphContract, TensorContract


class LoadedGraph(NamedTuple):
    """A graph and its external data, verified, as bytes that nobody else can alter.

    Attributes:
        name: of the file in the bundle.
        model: the graph's file.
        data: content of each external-data file, by the name that the graph has for it.
    """

    name: str
    model: bytes
    data: dict[str, mmap.mmap | bytes]


def load_graph(files: BundleFiles, name: str) -> LoadedGraph:
    """Reads a graph to run it.

    Raises:
        SemkvError: when a file of it was altered since the bundle was opened, or is not one of the bundle.
    """
    content = files.read(name)
    locations = _data_files(files, name, _parse(files, name, content))
    return LoadedGraph(name, content, {location: files.private(listed) for location, listed in locations.items()})


def check_graph(files: BundleFiles, name: str, contracts: Sequence[GraphContract]) -> None:
    """Fails unless a graph's weights are files of the bundle and its inputs and outputs are what contracts say.

    Raises:
        SemkvError: naming the graph and what is wrong.
    """
    model = _parse(files, name, files.read(name))
    _data_files(files, name, model)
    for contract in contracts:
        for what, expected, got in _differences(model.graph, contract):
            raise SemkvError(
                f"the graph has another {what} than the manifest says",
                where=files.root / name,
                expected=expected,
                got=got,
                fix=REBUILD,
            )


def _parse(files: BundleFiles, name: str, content: bytes) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(content)
        check_text(model)
        return model
    except DecodeError:
        raise SemkvError("not an ONNX model", where=files.root / name, fix=REBUILD) from None


def _data_files(files: BundleFiles, name: str, model: onnx.ModelProto) -> dict[str, str]:
    """Names of a graph's external-data files: the graph's for them, and the bundle's.

    Raises:
        SemkvError: when one is not a file of the bundle, or ends before a tensor does.
    """
    where, found = files.root / name, {}
    for tensor in external_tensors(model):
        listed = posixpath.join(posixpath.dirname(name), tensor.location)
        record = files.records.get(listed) if is_inside(tensor.location) else None
        if record is None:
            raise SemkvError(
                "external data that the bundle does not list",
                where=where,
                expected="files of the bundle beside the graph",
                got=f"{tensor.location!r} of tensor {tensor.tensor}",
                fix=REBUILD,
            )
        found[tensor.location] = listed
        if tensor.offset + (tensor.length or 0) > record.bytes:
            raise SemkvError(
                "a tensor lies beyond its file's end",
                where=where,
                expected=f"{record.bytes} bytes",
                got=f"tensor {tensor.tensor} at {tensor.offset}, {tensor.length} bytes long",
                fix=REBUILD,
            )
    return found


def _differences(graph: onnx.GraphProto, contract: GraphContract) -> Iterator[tuple[str, object, object]]:
    """Where inputs, outputs and aliases differ from the contract's: what, the contract's, the graph's."""
    sides = (("input", contract.inputs, graph.input), ("output", contract.outputs, graph.output))
    for side, said, there in sides:
        shapes = {tensor.name: _shape(tensor) for tensor in said}
        found = {value.name: _shape_of(value) for value in there}
        for name in sorted(shapes.keys() ^ found.keys()):
            yield f"list of {side}s", f"{name} {shapes.get(name, 'not there')}", found.get(name, "not there")
        for name in sorted(shapes.keys() & found.keys()):
            if shapes[name] != found[name]:
                yield f"{side} {name}", shapes[name], found[name]
    inputs, outputs = ({value.name for value in values} for values in (graph.input, graph.output))
    for source, result in contract.aliases.items():
        if source not in inputs or result not in outputs:
            yield "pair of aliases", f"{source} and {result}", "no such tensors"


def _shape(tensor: TensorContract) -> list[int | str]:
    return list(tensor.shape)


def _shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    """Sizes, and names where they are open, as contracts have them."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

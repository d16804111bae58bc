"""What an operator of the `semkv` domain looks like from outside, as data.

One `OperatorSpec` per operator is the single source for names, shapes, element types and attribute defaults; the
ONNX function, the torch schema, the exporter, the plugins and the documentation table are all checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

DOMAIN = "semkv"
VERSION = 1
OPSET = 24
"""Opset of the default domain that function bodies are written in."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its shape as text ("B,Hkv,C,D") and its element type.

    dtype: "T" (the cache's type: float32, float16, bfloat16; the same for every "T" of a node), "float32" or "int64".
    """

    name: str
    shape: str
    dtype: str

    @property
    def dims(self) -> tuple[str, ...]:
        """The shape's dimension names, in order."""
        return tuple(self.shape.split(","))


@dataclass(frozen=True)
class OperatorSpec:
    """An operator: name in the `semkv` domain, inputs, outputs, and attributes with their default values."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    @property
    def torch_name(self) -> str:
        """Name under `torch.ops.semkv`: the operator's name in snake case."""
        return "".join("_" + c.lower() if c.isupper() else c for c in self.name).lstrip("_")

    @property
    def torch_schema(self) -> str:
        """The torch schema: all inputs as tensors, then the attributes with their defaults, all outputs as tensors."""
        arguments = [f"Tensor {name}" for name in self.input_names]
        arguments += [f"{type(value).__name__} {name}={value}" for name, value in self.attributes.items()]
        return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(self.outputs))})"


def tensors(*rows: str) -> tuple[TensorSpec, ...]:
    """Tensor specs from rows of "name shape dtype", e.g. "length B int64"."""
    return tuple(TensorSpec(*row.split()) for row in rows)


def make_node(
    spec: OperatorSpec, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: float
) -> onnx.NodeProto:
    """A node of the operator with every attribute written out, defaults included.

    Writers of graphs should do the same: `onnx.reference.ReferenceEvaluator` (onnx 1.23) does not apply a function's
    attribute defaults and refuses a node that leaves one out. Raises SemkvError for an attribute the operator lacks.
    """
    import onnx.helper

    from semkv_deploy.errors import SemkvError

    if unknown := set(attributes) - set(spec.attributes):
        raise SemkvError("unknown attribute", where=spec.name, expected=sorted(spec.attributes), got=sorted(unknown))
    node = onnx.helper.make_node(spec.name, inputs, outputs, name=name, domain=DOMAIN)
    for key, default in spec.attributes.items():
        node.attribute.append(onnx.helper.make_attribute(key, type(default)(attributes.get(key, default))))
    return node


def parse_function(spec: OperatorSpec, body: str) -> onnx.FunctionProto:
    """The operator's model-local function: the signature comes from `spec`, the body is ONNX text syntax.

    Raises whatever `onnx.parser` and `onnx.checker` raise when the body is not valid ONNX of opset `OPSET`.
    """
    import onnx.checker
    import onnx.parser

    attributes = ", ".join(f"{name}: {type(v).__name__} = {v}" for name, v in spec.attributes.items())
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
        f"{spec.name} {f'<{attributes}>' if attributes else ''} ({', '.join(spec.input_names)}) "
        f"=> ({', '.join(spec.output_names)}) {{\n{body}\n}}"
    )
    function = onnx.parser.parse_function(text)
    onnx.checker.check_function(function)
    return function


def register_torch_op(
    spec: OperatorSpec,
    reference: Callable[..., tuple[Any, ...]],
    fake: Callable[..., tuple[Any, ...]],
) -> None:
    """Register `torch.ops.semkv.<name>`: functional (new tensors out), run by `reference`, traced by `fake`.

    Registering the same operator twice is an error of torch's; callers guard with `functools.cache`.
    """
    import torch

    op = torch.library.custom_op(f"{DOMAIN}::{spec.torch_name}", reference, mutates_args=(), schema=spec.torch_schema)
    op.register_fake(fake)


def sizes(named: Sequence[tuple[str, Sequence[int]]]) -> dict[str, int]:
    """Dimension sizes from pairs of (shape text, actual shape); the check behind every reference implementation.

    Raises SemkvError naming the dimension when ranks differ or one name stands for two sizes.
    """
    from semkv_deploy.errors import SemkvError

    found: dict[str, int] = {}
    for text, shape in named:
        names = text.split(",")
        if len(names) != len(shape):
            raise SemkvError("wrong number of dimensions", expected=f"[{text}]", got=list(shape))
        for name, size in zip(names, shape, strict=True):
            if found.setdefault(name, size) != size:
                raise SemkvError(f"dimension {name} differs between inputs", expected=found[name], got=size)
    return found

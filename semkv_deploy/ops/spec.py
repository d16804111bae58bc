"""What an operator of the `semkv` domain looks like from outside, as data.

One `OperatorSpec` per operator is the single source for names, shapes, element types and attribute defaults; the
ONNX function, the torch schema, the exporter, the plugins and the documentation table are all checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    A dimension of an output that is named like one of the operator's attributes has that attribute's value.
    dtype: "T" (the cache's type: float32, float16, bfloat16; the same for every "T" of a node), "float32", "int64", and
    with the options that say so "int8" or "float8e4m3fn".
    """

    name: str
    shape: str
    dtype: str

    @property
    def dims(self) -> tuple[str, ...]:
        """The shape's dimension names, in order."""
        return tuple(self.shape.split(","))


@dataclass(frozen=True)
class Option:
    """Something a node of an operator may have besides what every node has.

    An ONNX function can neither test for an input that is not there nor leave out an output, so that each set of
    options has a function of its own, told apart by its `overload` (names of the options, joined by "_"). On a node an
    option shows as the attribute of its name too, value 1, because that is all a plugin's creator gets to see.
    ONNX Runtime, onnx.inliner, onnx_ir and TensorRT-RTX tell overloads apart; `onnx.reference.ReferenceEvaluator` (onnx
    1.23) does not, so that it runs a model with one of them only.

    inputs, outputs: appended to the operator's, in the order of its options.
    dtypes: tensors of the operator whose element type becomes another one.
    excludes: options that cannot be had together with this one.
    """

    name: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OperatorSpec:
    """An operator: name in the `semkv` domain, inputs, outputs, and attributes with their default values.

    `options` are what its nodes may have besides; `with_options` gives the spec of a node that has some of them.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: Mapping[str, int | float] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    overload: str = ""

    def with_options(self, *names: str) -> OperatorSpec:
        """The spec of a node with these options, in whatever order they are named.

        Raises SemkvError for a name that is no option, or two that exclude each other.
        """
        from semkv_deploy.errors import SemkvError

        known = [option.name for option in self.options]
        if unknown := sorted(set(names) - set(known)):
            raise SemkvError("unknown option", where=self.name, expected=known, got=unknown)
        spec = self
        chosen = [option for option in self.options if option.name in names]
        for option in chosen:
            if clash := sorted(set(option.excludes) & set(names)):
                raise SemkvError("options exclude each other", where=self.name, got=[option.name, *clash])
            spec = replace(
                spec,
                inputs=_retyped(spec.inputs, option.dtypes) + option.inputs,
                outputs=_retyped(spec.outputs, option.dtypes) + option.outputs,
                attributes={**spec.attributes, option.name: 1},
            )
        return replace(spec, overload="_".join(option.name for option in chosen))

    def variants(self) -> list[OperatorSpec]:
        """The spec of every set of options that can be had together, that of none first."""
        sets: list[list[Option]] = [[]]
        for option in self.options:
            sets += [[*s, option] for s in sets if not {o.name for o in s} & set(option.excludes)]
        return [self.with_options(*(option.name for option in s)) for s in sets]

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
        """The torch schema: all inputs as tensors, then the attributes with their defaults, all outputs as tensors.

        Options are not among the attributes: torch has an overload for each set of them, named as the ONNX function's.
        """
        options = {option.name for option in self.options}
        values = [(name, value) for name, value in self.attributes.items() if name not in options]
        arguments = [f"Tensor {name}" for name in self.input_names]
        arguments += [f"{type(value).__name__} {name}={value}" for name, value in values]
        return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(self.outputs))})"


def _retyped(specs: tuple[TensorSpec, ...], dtypes: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, dtype=dtypes.get(spec.name, spec.dtype)) for spec in specs)


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
    node = onnx.helper.make_node(spec.name, inputs, outputs, name=name, domain=DOMAIN, overload=spec.overload or None)
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
    overload = f', overload: "{spec.overload}"' if spec.overload else ""
    text = (
        f'<domain: "{DOMAIN}"{overload}, opset_import: ["": {OPSET}]>\n'
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

    Both return a tuple of the outputs; the operator of one output returns the tensor itself, as torch has it.
    A spec with options becomes an overload, `torch.ops.semkv.<name>.<overload>`.
    Registering the same operator twice is an error of torch's; callers guard with `functools.cache`.
    """
    import torch

    def outputs(function: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        return function if len(spec.outputs) > 1 else lambda *inputs, **attributes: function(*inputs, **attributes)[0]

    name = f"{DOMAIN}::{spec.torch_name}{'.' + spec.overload if spec.overload else ''}"
    op = torch.library.custom_op(name, outputs(reference), mutates_args=(), schema=spec.torch_schema)
    op.register_fake(outputs(fake))


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

"""Random changes of a graph that mostly leave it loadable, and mostly make it another function."""

from __future__ import annotations

import random

import numpy as np
import onnx
from onnx import helper, numpy_helper

UNARY = ("Neg", "Cos", "Sin", "Cast", "Tanh", "Sigmoid", "Reciprocal", "Sqrt", "Softmax", "IsNaN", "Not")
PAIRED = ("Sub", "Mul", "Add", "Where", "Concat", "LessOrEqual", "Greater", "And", "MatMul")


def mutate(graph: onnx.GraphProto, seed: int) -> str:
    """Changes a graph in place; returns what was done, for the message of a failure."""
    pick = random.Random(seed)
    kinds = [scaled, swapped, transposed, moved, skipped, crossed, adjusted, dropped]
    while True:
        done = pick.choice(kinds)(graph, pick)
        if done:
            return done


def constants(graph: onnx.GraphProto, kind: int, most: int) -> list[onnx.TensorProto]:
    """Tensors of one type and so many elements at most, those of Constant nodes too."""
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    held = [each.t for node in nodes for each in node.attribute if each.name == "value"]
    return [each for each in (*graph.initializer, *held) if each.data_type == kind and 0 < np.prod(each.dims) <= most]


def scaled(graph: onnx.GraphProto, pick: random.Random) -> str:
    """A scale, an epsilon, a norm's weight or a mask's value."""
    found = constants(graph, onnx.TensorProto.FLOAT, 64)
    if not found:
        return ""
    tensor, factor = pick.choice(found), pick.choice((0.5, 1.5, -1, 0))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    return f"{tensor.name} times {factor}"


def swapped(graph: onnx.GraphProto, pick: random.Random) -> str:
    """A node's last two inputs."""
    found = [node for node in graph.node if node.op_type in PAIRED and len(node.input) > 1]
    if not found:
        return ""
    node = pick.choice(found)
    node.input[-2], node.input[-1] = node.input[-1], node.input[-2]
    return f"inputs of {node.op_type} {node.name} swapped"


def transposed(graph: onnx.GraphProto, pick: random.Random) -> str:
    """Heads in place of rows."""
    found = [node for node in graph.node if node.op_type == "Transpose"]
    if not found:
        return ""
    node = pick.choice(found)
    (perm,) = node.attribute
    order = list(perm.ints)
    pick.shuffle(order)
    perm.ints[:] = order
    return f"{node.name} by {order}"


def moved(graph: onnx.GraphProto, pick: random.Random) -> str:
    """A slice's end, an axis, a size: of rotary's halves, of a window, of heads."""
    found = constants(graph, onnx.TensorProto.INT64, 4)
    if not found:
        return ""
    tensor = pick.choice(found)
    array = numpy_helper.to_array(tensor).copy()
    place = pick.randrange(array.size)
    array.reshape(-1)[place] += pick.choice((-4, -1, 1, 4))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return f"{tensor.name} is {array.tolist()}"


def skipped(graph: onnx.GraphProto, pick: random.Random) -> str:
    """A function that is left out."""
    found = [node for node in graph.node if node.op_type in UNARY]
    if not found:
        return ""
    node = pick.choice(found)
    done = f"{node.op_type} {node.name} left out"
    node.op_type = "Identity"
    del node.attribute[:]
    return done


def crossed(graph: onnx.GraphProto, pick: random.Random) -> str:
    """Two nodes of a kind read each other's input: another layer's cache, another's mask, sine for cosine."""
    kinds = sorted({node.op_type for node in graph.node if node.input})
    kind = pick.choice(kinds)
    nodes = [node for node in graph.node if node.op_type == kind and node.input]
    if len(nodes) < 2:
        return ""
    first, second = pick.sample(nodes, 2)
    place = pick.randrange(min(len(first.input), len(second.input)))
    if first.input[place] == second.input[place]:
        return ""
    first.input[place], second.input[place] = second.input[place], first.input[place]
    return f"input {place} of {kind} {first.name} and {second.name} exchanged"


def adjusted(graph: onnx.GraphProto, pick: random.Random) -> str:
    """An attribute: a window, a soft cap, heads, a scale, an axis."""
    found = [(node, each) for node in graph.node for each in node.attribute if each.type in (1, 2)]
    if not found:
        return ""
    node, attribute = pick.choice(found)
    if attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = pick.choice((attribute.f * 1.5, attribute.f + 0.25, 0.0))
    else:
        attribute.i = pick.choice((attribute.i + 1, attribute.i - 1, 1 - attribute.i, 7))
    return f"{attribute.name} of {node.op_type} {node.name} is {helper.get_attribute_value(attribute)}"


def dropped(graph: onnx.GraphProto, pick: random.Random) -> str:
    """An optional input: a mask, a bias, tables."""
    found = [node for node in graph.node if node.op_type in ("Attention", "GroupQueryAttention", "Clip", "Slice")]
    if not found:
        return ""
    node = pick.choice(found)
    place = pick.randrange(len(node.input))
    if not node.input[place]:
        return ""
    node.input[place] = ""
    return f"input {place} of {node.op_type} {node.name} dropped"

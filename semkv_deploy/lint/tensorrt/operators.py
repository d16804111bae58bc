"""Rules about operators: unknown ones, ones of other domains, plugins, scatters with a reduction, loops."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from semkv_deploy.graph.reads import reads, subgraphs
from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt.view import STANDARD_DOMAINS, Rule, View, at, attribute, number, text
from semkv_deploy.ops import DOMAIN

_UNKNOWN = """
AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger
MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty
SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat
StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
"""

UNKNOWN_STANDARD = frozenset(_UNKNOWN.split())
"""Operators of ONNX (opset 28) that the importer of TensorRT-RTX 1.7.1 does not know (`supports_operator`)."""

KNOWN_OTHER = frozenset(
    {"MultiHeadAttention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "QMoE"}
    | {"TRT_Attention", "TRT_KVCacheUpdate", "TRT_MoE"}
)
"""Operators outside the standard that it knows without a plugin library."""

NEEDS_LIBRARY = frozenset({"GroupQueryAttention", "MatMulNBits"})
"""Operators that it hands to plugins of the ONNX Runtime TensorRT-RTX provider."""

STANDARD = frozenset(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "") - UNKNOWN_STANDARD


def unknown_operator(view: View) -> Iterator[Finding]:
    """Refused: "Plugin not found, are the plugin name, version, and namespace correct?"."""
    functions = {(function.domain, function.name) for function in view.model.functions}
    for node, _ in view.nodes:
        known = node.op_type in STANDARD | KNOWN_OTHER | view.plugins
        called = (node.domain, node.op_type) in functions
        if known or called or node.op_type in NEEDS_LIBRARY or attribute(node, "plugin_namespace") is not None:
            continue
        name = node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"
        fix = "ask for it as a plugin, or lower it" if node.domain == DOMAIN else "write it in operators that are known"
        yield at(node, f"{name} is not known to the importer", fix, "blocked")


def operator_needs_library(view: View) -> Iterator[Finding]:
    """Refused: "failed to load GroupQueryAttention plugin": known by name, but the kernels are elsewhere."""
    for node, _ in view.nodes:
        if node.op_type in NEEDS_LIBRARY and node.op_type not in view.plugins:
            what = f"{node.op_type} needs the plugin library of the ONNX Runtime provider, which is not loaded"
            yield at(node, what, "lower it to TensorScatter and Attention, or to MatMul", "blocked")


def operator_of_another_domain(view: View) -> Iterator[Finding]:
    """The importer goes by the name alone: `foo.Sub` becomes Sub, and a local function `foo.Add` is ignored for Add.

    With RotaryEmbedding it puts the inputs of com.microsoft in the right places; Gelu, QuantizeLinear and
    DequantizeLinear mean the same there.
    """
    same = {"RotaryEmbedding", "Gelu", "QuantizeLinear", "DequantizeLinear"}
    functions = {(function.domain, function.name) for function in view.model.functions}
    for node in _nodes_before_inlining(view):
        if node.domain in STANDARD_DOMAINS or node.op_type not in STANDARD or node.op_type in view.plugins:
            continue
        if node.domain == "com.microsoft" and node.op_type in same:
            continue
        what = f"{node.domain}.{node.op_type} is taken for the standard {node.op_type}"
        if (node.domain, node.op_type) in functions:
            what += ", its function is ignored"
        yield at(node, what, "give the operator a name that ONNX does not have", "wrong")


def multi_head_attention_causal(view: View) -> Iterator[Finding]:
    """`com.microsoft.MultiHeadAttention` with `unidirectional`: accepted, and not causal."""
    for node, _ in view.of_type("MultiHeadAttention", domains=("com.microsoft",)):
        if number(node, "unidirectional"):
            yield at(node, "unidirectional is ignored: rows see what comes after them", "use Attention", "wrong")


def plugin_hidden_by_function(view: View) -> Iterator[Finding]:
    """A local function stays in the model: without `plugin_namespace` it wins over the plugin, without a word.

    With `plugin_namespace` the plugin wins where it is registered (`plugin_version` defaults to "1"), and the function,
    again without a word, where it is not. `plugin_version` alone does nothing.
    """
    functions = {(function.domain, function.name) for function in view.model.functions}
    fix = "remove the local function: then a missing plugin is an error"
    for node in _nodes_before_inlining(view):
        has = {name for name in ("plugin_namespace", "plugin_version") if attribute(node, name) is not None}
        if (node.domain, node.op_type) not in functions or not (has or node.op_type in view.plugins):
            continue
        if "plugin_namespace" not in has:
            what = f"{node.op_type} is asked for as a plugin without plugin_namespace: its local function is used"
            yield at(node, what, fix, "wrong")
        elif text(node, "plugin_version", "1") != "1":
            version = text(node, "plugin_version")
            what = f"plugin_version {version}: where it is not registered, the local function is used"
            yield at(node, what, fix, "wrong")
        else:
            what = f"where the plugin {node.op_type} is not registered, its local function is used without a word"
            yield at(node, what, fix, "unverified")


def plugin_needed(view: View) -> Iterator[Finding]:
    """A node with plugin attributes and no function: it imports only where that creator is registered."""
    functions = {(function.domain, function.name) for function in view.model.functions}
    for node in _nodes_before_inlining(view):
        named = attribute(node, "plugin_namespace") is not None
        if named and (node.domain, node.op_type) not in functions and node.op_type not in view.plugins:
            space = text(node, "plugin_namespace")
            what = f"needs the plugin {node.op_type} of namespace {space!r}"
            yield at(node, what, "load its library before parsing", "unverified")


def not_lowered(view: View) -> Iterator[Finding]:
    """A `semkv` node with a function and no plugin: its body is inlined, operator by operator."""
    functions = {(function.domain, function.name) for function in view.model.functions}
    for node in _nodes_before_inlining(view):
        asked = node.op_type in view.plugins or any(entry.name.startswith("plugin_") for entry in node.attribute)
        if node.domain == DOMAIN and (DOMAIN, node.op_type) in functions and not asked:
            what = f"{node.op_type} was not lowered: its function body is inlined, unfused"
            yield at(node, what, "lower it: semkv-deploy build", "slow")


def scatter_reduction(view: View) -> Iterator[Finding]:
    """Refused: "ScatterND with reduction is not supported"; ScatterElements: "Unsupported reduction type"."""
    for node, _ in view.of_type("ScatterND", "ScatterElements"):
        if (reduction := text(node, "reduction", "none")) != "none":
            what = f'{node.op_type} with reduction "{reduction}" is refused'
            yield at(node, what, "write the reduction as a product with a one-hot or banded matrix", "blocked")


def loop_in_branch(view: View) -> Iterator[Finding]:
    """A Loop inside an If: an internal error in graphScope.cpp when building, in two cases.

    An If inside that Loop; or a node of the Loop that reads a value from outside the Loop, other than the body's first
    node. A Loop inside a Loop alone builds, also with such values.

    The true condition is inside the builder; this one was found by trying. Over 44 nestings of Loop and If, up to three
    deep, it finds all 14 that are refused, with one false alarm: a Loop in a Loop in an If whose inner Loop reads a
    value of the outer one.
    """
    for node, inside in view.of_type("Loop"):
        if "If" not in inside:
            continue
        body = next(subgraphs(node), None)
        if body is None:
            continue
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own |= {output for inner in body.node for output in inner.output}
        constants = {placed.node.output[0] for placed in view.of_type("Constant")}
        work = [inner for inner in body.node if inner.op_type not in ("Constant", "Identity")]
        outside = {name for inner in work[1:] for name in reads(inner) if name and name not in own | constants}
        if any(inner.op_type == "If" for inner in work):
            reason = "with an If inside"
        elif outside:
            reason = f"that reads {sorted(outside)[0]} from outside"
        else:
            continue
        what = f"a Loop inside an If, {reason}, ends in an internal error of the builder"
        yield at(node, what, "compute both sides and choose with Where", "blocked")


def _nodes_before_inlining(view: View) -> Iterator[onnx.NodeProto]:
    """Nodes as written, those of subgraphs and local functions included."""

    def walk(nodes: object) -> Iterator[onnx.NodeProto]:
        for node in nodes:  # type: ignore[attr-defined]
            yield node
            for body in subgraphs(node):
                yield from walk(body.node)

    yield from walk(view.model.graph.node)
    for function in view.model.functions:
        yield from walk(function.node)


RULES: list[Rule] = [
    unknown_operator,
    operator_needs_library,
    operator_of_another_domain,
    multi_head_attention_causal,
    plugin_hidden_by_function,
    plugin_needed,
    not_lowered,
    scatter_reduction,
    loop_in_branch,
]

"""What no rule takes, by name: the nearest thing that a graph has, and what to do instead."""

from __future__ import annotations

import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.decomposed import grown_caches
from semkv_deploy.export.foreign.layers import CONTRIB
from semkv_deploy.graph.editing import attribute

KNOWN_DOMAINS = ("", CONTRIB)

_STATE_OPERATORS = {"CausalConvWithState", "LinearAttention", "MambaScan", "SelectiveScan"}

_OTHER_ATTENTION = {
    "Attention": "projects queries, keys and values itself, and keeps both caches in one tensor",
    "DecoderMaskedMultiHeadAttention": "keeps caches of beams",
    "DecoderMaskedSelfAttention": "keeps caches of beams",
    "LongformerAttention": "attends to a window and to chosen tokens",
    "PackedAttention": "takes rows without padding, and no past",
    "PackedMultiHeadAttention": "takes rows without padding, and no past",
    "PagedAttention": "keeps its cache in pages that a table of the host names",
    "SparseAttention": "attends to blocks that a table chooses",
}
"""ONNX Runtime's attention that no rule takes, and why."""

_CHECKPOINT = "export the checkpoint it was made from: semkv-deploy export <checkpoint> -o <dir>"


def check_operators(graph: ir.Graph, where: str) -> None:
    """Goes through the operators of a graph.

    Raises:
        SemkvError: naming the first of a custom domain, of states that are no cache, of attention that no rule takes;
            or a bfloat16 input.
    """
    for value in graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            raise SemkvError(
                "a bfloat16 graph: ONNX Runtime's CPU does not run it, so that an import could not be proved",
                where=f"{where}: {value.name}",
                expected="float32 or float16",
                got="bfloat16",
                fix="export it in one of these; build for TensorRT has --dtype bfloat16",
            )
    for node in graph:
        place = f"{where}: {node.name}"
        if node.domain not in KNOWN_DOMAINS:
            raise SemkvError("an operator of a custom domain", where=place, got=f"{node.domain}::{node.op_type}")
        if node.op_type in _STATE_OPERATORS:
            raise SemkvError("a state-space or linear attention state is no KV cache", where=place, got=node.op_type)
        if node.domain == CONTRIB and node.op_type in _OTHER_ATTENTION:
            raise SemkvError(
                f"attention that {_OTHER_ATTENTION[node.op_type]}",
                where=place,
                expected="GroupQueryAttention, MultiHeadAttention, or ONNX's own operators",
                got=f"{node.domain}::{node.op_type}",
                fix="onnxruntime-genai's builder writes one of these for its CPU: -e cpu",
            )


def no_attention(graph: ir.Graph, where: str) -> SemkvError:
    """The error for a graph in which no rule found a layer."""
    for value in graph.inputs:
        if (found := _odd_cache(value)) is not None:
            return found
    if not any(_readers(value) for value in graph.inputs if value.shape is not None and len(value.shape) > 2):
        return SemkvError(
            "a decoder without a past: it has no cache to compress",
            where=where,
            expected="inputs for past keys and values of every layer",
            got=[value.name for value in graph.inputs],
            fix="export it with its past (optimum: --task text-generation-with-past)",
        )
    return SemkvError(
        "no attention that an importer knows",
        where=where,
        expected="GroupQueryAttention, MultiHeadAttention, Attention, or caches grown by Concat with Softmax",
        got=_nearest(graph),
        fix=_CHECKPOINT,
    )


def other_input(value: ir.Value, graph: ir.Graph) -> SemkvError:
    """The error for an input that is none of a decoder's."""
    name = value.name or ""
    if any(grown.past is value for grown in grown_caches(graph)):
        return SemkvError(
            "a cache whose attention is not recognised",
            where=name,
            expected="MatMul with queries, mask, Softmax, MatMul with values",
            got=sorted({use.node.op_type for grown in grown_caches(graph) for use in grown.present.uses()}),
        )
    what = "an input that has no role in a decoder of tokens"
    if "encoder" in name or "cross" in name:
        what = "an encoder-decoder: cross attention's inputs are no cache of a decoder"
    elif any(part in name for part in ("conv", "ssm", "recurrent")):
        what = "a state-space or linear attention state is no KV cache"
    elif (found := _odd_cache(value)) is not None:
        return found
    return SemkvError(what, where=name, expected="input_ids, attention_mask, position_ids and caches of attention")


def _odd_cache(value: ir.Value) -> SemkvError | None:
    """The error for what looks like a cache, and is not kept as one."""
    rank = None if value.shape is None else len(value.shape)
    readers = _readers(value)
    if rank is None or rank < 3 or not readers:
        return None
    grows = next((node for node in readers if node.op_type == "Concat"), None)
    expected = "a cache [batch, heads, slots, size] that one Concat along its slots makes an output of"
    if grows is None:
        kinds = {node.op_type for node in readers}
        if rank != 4 or kinds & {"GroupQueryAttention", "MultiHeadAttention", "Attention", "TensorScatter"}:
            return None
        what = "a cache that nothing is appended to: cross attention's, or one of the host's own"
        return SemkvError(what, where=value.name, expected=expected, got=f"read by {', '.join(sorted(kinds))}")
    axis = attribute(grows, "axis", 0) % rank
    if rank != 4 or axis != 2:
        what, got = "a cache in another layout", f"{rank} dimensions, appended to along axis {axis} by {grows.name}"
        return SemkvError(what, where=value.name, expected=expected, got=got, fix=_CHECKPOINT)
    if not grows.outputs[0].is_graph_output():
        what = "a cache that slides, or leaves the graph otherwise than it was appended to"
        got = f"read by {', '.join(sorted({use.node.op_type for use in grows.outputs[0].uses()}))}"
        return SemkvError(what, where=value.name, expected=expected, got=got, fix=_CHECKPOINT)
    return None


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read more of a value than its size."""
    return [use.node for use in value.uses() if use.node.op_type != "Shape"]


def _nearest(graph: ir.Graph) -> str:
    """What of an attention there is."""
    kinds = {node.op_type for node in graph}
    for kind in ("TensorScatter", "Attention", "Softmax"):
        if kind in kinds:
            node = next(node for node in graph if node.op_type == kind)
            return f"{kind} at {node.name}, which is not imported yet"
    return "no attention at all"

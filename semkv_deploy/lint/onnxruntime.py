"""What a target would refuse or, worse, ignore without a word: found in the ONNX, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from semkv_deploy.graph.external_data import external_faults
from semkv_deploy.ops import DOMAIN

Verdict = Literal["blocked", "wrong", "slow", "unverified"]
"""`blocked`: the target refuses it. `wrong`: it is accepted and ignored, so that answers are wrong without a word.
`slow`: it works, with copies or without a fused kernel. `unverified`: it cannot be judged from the ONNX alone."""

HEAD_SIZE_MULTIPLE = 8
"""Of `GroupQueryAttention`'s kernels: other head sizes are refused when the first token is run."""

NATIVE = ("NexusAttention", "CompactCache", "SemanticCluster")
"""Operators that the native library has, some of them under names with options in them."""

FATAL = ("wrong", "blocked")


@dataclass(frozen=True)
class Finding:
    """One finding: the node, what the target does with it, the way out, and the rule that found it."""

    node: str
    what: str
    fix: str
    verdict: Verdict
    rule: str = ""

    @property
    def fatal(self) -> bool:
        """Whether it stops a build."""
        return self.verdict in FATAL

    def __str__(self) -> str:
        return f"{self.node}: {self.what}; {self.fix}"


def lint_onnxruntime(model: onnx.ModelProto, *, native: bool = False) -> list[Finding]:
    """Findings for `onnxruntime-*` in a lowered decoder, or in a compressor, whose function bodies are meant to run.

    Args:
        native: nodes of domain `semkv` are meant to run as native operators.
    """
    findings = []
    shapes = _static_shapes(model.graph)
    functions = {function.name for function in model.functions} - {"NexusAttention"}

    def found(node: onnx.NodeProto, what: str, fix: str, verdict: Verdict, rule: str) -> None:
        findings.append(Finding(node_name(node), what, fix, verdict, rule))

    for node in model.graph.node:
        meant = native and node.op_type.split("_")[0] in NATIVE
        if node.domain == DOMAIN and node.op_type not in functions and not meant:
            what = f"{node.op_type} was not lowered and runs as its slow function body"
            found(node, what, "lower it", "blocked", "not_lowered")
        if node.op_type != "GroupQueryAttention":
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        causal = attributes["causal"].i if "causal" in attributes else 1
        window = attributes["local_window_size"].i if "local_window_size" in attributes else -1
        if not causal and window > 0:
            fix = "use the portable graph for this model"
            found(node, "a window is ignored where causal = 0", fix, "wrong", "window_without_causality")
        size = next((shapes[name][-1] for name in node.input[3:5] if shapes.get(name)), None)
        if size is not None and size % HEAD_SIZE_MULTIPLE:
            what = f"a head size of {size} is refused at run time: it must be a multiple of {HEAD_SIZE_MULTIPLE}"
            found(node, what, "use the portable graph for this model", "blocked", "head_size")
        if len(node.input) < 17 or not node.input[16]:
            what = "without query_seqlens several rows with a past are refused when batch > 1"
            fix = "connect query_seqlens, or prefill rows one by one"
            found(node, what, fix, "unverified", "rows_with_past")
    return findings


def lint_files(model: onnx.ModelProto, folder: Path) -> list[Finding]:
    """Findings about weights in other files, which hold for every target."""
    fix = "keep the model and its data together, or export again"
    return [Finding(name, fault, fix, "blocked", "external_data") for name, fault in external_faults(model, folder)]


def _static_shapes(graph: onnx.GraphProto) -> dict[str, list[int | None]]:
    """Shapes of the graph's inputs, dimensions that are not static None."""
    return {
        value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }


def node_name(node: onnx.NodeProto) -> str:
    """How a finding names a node: its name, or what it makes."""
    made = next((output for output in node.output if output), "")
    return node.name or f"{node.op_type} -> {made}"

"""What a target would refuse or, worse, ignore without a word: found in the ONNX, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from semkv_deploy.ops import DOMAIN


@dataclass(frozen=True)
class Finding:
    """One finding: the node, what the target does with it, and the way out. `fatal` ones stop a build."""

    node: str
    what: str
    fix: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.node}: {self.what}; {self.fix}"


def lint_onnxruntime(model: onnx.ModelProto) -> list[Finding]:
    """Findings for `onnxruntime-*` in a lowered decoder."""
    findings = []
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.domain == DOMAIN:
            findings.append(
                Finding(
                    node.name, f"{node.op_type} was not lowered and runs as its slow function body", "lower it", True
                )
            )
        if node.op_type != "GroupQueryAttention":
            continue
        causal = attributes["causal"].i if "causal" in attributes else 1
        window = attributes["local_window_size"].i if "local_window_size" in attributes else -1
        if not causal and window > 0:
            findings.append(
                Finding(
                    node.name, "a window is ignored where causal = 0", "use the portable graph for this model", True
                )
            )
        if len(node.input) < 17 or not node.input[16]:
            findings.append(
                Finding(
                    node.name,
                    "without query_seqlens several rows with a past are refused when batch > 1",
                    "connect query_seqlens, or prefill rows one by one",
                    False,
                )
            )
    return findings

"""Random small cases of all operators against the references on the CPU; outputs start poisoned.

The seeds are strided, so that the first few cases already differ in type, head size and options and the whole run meets
every combination (tests/plugins/test_gpu_check.py counts them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bindings
import block_cases
import compaction_cases
import nexus_cases
import torch
from report import Report, first_line

from semkv_deploy.ops import (
    compact_cache,
    semantic_block_map,
    semantic_block_select,
    semantic_cluster,
)

COUNTS = {
    "NexusAttention": 120,
    "NexusAttention with options": 165,
    "CompactCache": 45,
    "SemanticCluster": 30,
    "SemanticBlockMap": 36,
    "SemanticBlockSelect": 72,
}
"""Cases of a whole run. 120 are every head size, type and GQA group; 165 every head size, type and set of options."""


def seeds(operator: str, count: int) -> list[int]:
    """The first `count` seeds of an operator's cases, in the order in which they are run."""
    if operator == "NexusAttention":
        return [i * 49 % 120 + i // 120 * 120 for i in range(count)]
    if operator == "NexusAttention with options":
        # Seed 8k + r: k counts head sizes and types, 15 of them; k and r the 11 sets of options; r the GQA group.
        return [8 * (7 * i % 165) + i % 15 % 8 + i // 165 * 1320 for i in range(count)]
    return list(range(count))


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """As float64, unless it is an integer."""
    return tensor.double() if tensor.is_floating_point() else tensor


def to(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Copies on the device."""
    return tuple(t.to(device) for t in tensors)


def reference(module: Any) -> Any:
    """The operator's reference, called with tensors and attributes packed."""
    return module.reference


def unequal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], tolerance: float) -> list[int]:
    """Indices of outputs that differ, absolutely and relatively, by more than the tolerance; with 0 bit for bit."""
    wrong = []
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a = a.cpu()
        close = torch.allclose(exact(a), exact(b), rtol=tolerance, atol=tolerance) if tolerance else torch.equal(a, b)
        if not close:
            wrong.append(i)
    return wrong


def nexus(kernels: bindings.Kernels, device: torch.device, seed: int) -> list[str]:
    inputs, attributes = nexus_cases.case(seed)
    want = nexus_cases.option_reference(inputs, {}, attributes)
    got = bindings.nexus_attention(kernels, to(inputs, device), **attributes)
    return nexus_cases.differences(to(got, torch.device("cpu")), want, False)


def nexus_options(kernels: bindings.Kernels, device: torch.device, seed: int) -> list[str]:
    inputs, options, attributes = nexus_cases.option_case(seed)
    want = nexus_cases.option_reference(inputs, options, attributes)
    given = {name: t.to(device) for name, t in options.items()}
    got = bindings.nexus_attention(kernels, to(inputs, device), given, **attributes)
    return nexus_cases.differences(to(got, torch.device("cpu")), want, attributes["mass"])


def compact(kernels: bindings.Kernels, device: torch.device, seed: int) -> list[str]:
    inputs = compaction_cases.compact_case(seed)
    want = compact_cache.reference(*inputs)
    wrong = []
    for in_place in (False, True):
        got = bindings.compact_cache(kernels, to(inputs, device), in_place)
        wrong += [f"in place {in_place}, output {i}" for i in unequal(got, want, 0.0)]
    return wrong


def cluster(kernels: bindings.Kernels, device: torch.device, seed: int) -> list[str]:
    inputs, span = compaction_cases.cluster_case(seed)
    want = reference(semantic_cluster)(*inputs, span=span)
    wrong = []
    for in_place in (False, True):
        got = bindings.semantic_cluster(kernels, to(inputs, device), span, in_place)
        different = unequal(got, want, nexus_cases.TOLERANCE[inputs[0].dtype])
        wrong += [f"in place {in_place}, output {i}" for i in different]
    return wrong


def block_map(kernels: bindings.Kernels, device: torch.device, seed: int) -> list[str]:
    inputs, attributes = block_cases.map_case(seed)
    want = reference(semantic_block_map)(*inputs, **attributes)
    got = bindings.semantic_block_map(kernels, to(inputs, device), **attributes)
    tolerance = nexus_cases.TOLERANCE[inputs[0].dtype] if attributes["vectors"] == 1 else 0.0
    return [f"output {i}" for i in unequal(got, want, tolerance)]


def block_select(kernels: bindings.Kernels, device: torch.device, seed: int) -> list[str]:
    inputs, attributes = block_cases.select_case(seed)
    want = reference(semantic_block_select)(*inputs, **attributes)
    got = bindings.semantic_block_select(kernels, to(inputs, device), **attributes)
    return [f"output {i}" for i in unequal(got, want, 0.0)]


RUN: dict[str, Callable[[bindings.Kernels, torch.device, int], list[str]]] = {
    "NexusAttention": nexus,
    "NexusAttention with options": nexus_options,
    "CompactCache": compact,
    "SemanticCluster": cluster,
    "SemanticBlockMap": block_map,
    "SemanticBlockSelect": block_select,
}


def order(share: float) -> list[tuple[str, int]]:
    """(operator, seed) of a share of the whole run, at least one of each, operators in turn by their shares: a run that
    is cut off has met all of them."""
    planned = []
    for operator, whole in COUNTS.items():
        count = max(1, round(whole * share))
        planned += [((i + 0.5) / count, operator, seed) for i, seed in enumerate(seeds(operator, count))]
    return [(operator, seed) for _, operator, seed in sorted(planned, key=lambda entry: entry[0])]


def sweep(kernels: bindings.Kernels, device: torch.device, share: float, report: Report) -> dict[str, Any]:
    """Runs a share of the cases, until the report says stop. The result's "cases" says how many were run, "planned" how
    many were to be. A case that raises is a failure of that case."""
    planned = order(share)
    done: dict[str, int] = dict.fromkeys(COUNTS, 0)
    failures = []
    for operator, seed in planned:
        if report.stopped():
            break
        try:
            wrong = RUN[operator](kernels, device, seed)
        except Exception as error:
            wrong = [first_line(error)]
            report.look_for_the_context()
        done[operator] += 1
        if wrong:
            failures.append(f"{operator} seed {seed}: {', '.join(wrong)}")
    return {"cases": sum(done.values()), "planned": len(planned), "by_operator": done, "failures": failures}

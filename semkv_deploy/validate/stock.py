"""Command lines that give a bundle's files to stock Polygraphy.

Its random inputs mean nothing to a model, but shapes and index ranges must be right: a `length` beyond the capacity, or
a `logits_index` beyond the rows, is refused. `run` and `inspect` need nothing else; `convert` needs TensorRT-RTX as the
module `tensorrt_rtx` (pip install tensorrt-rtx-cu13).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.bundle import TensorRTRecord

if TYPE_CHECKING:
    from semkv_deploy.bundle import BuiltProfile, Bundle
    from semkv_deploy.bundle.contract import StaticBudgetContract

ROWS = 8
"""Rows of a run, where the graph leaves them open."""

RTX_ENVIRONMENT = "POLYGRAPHY_USE_TENSORRT_RTX"
"""Set to 1, it makes stock Polygraphy use TensorRT-RTX for what it calls TensorRT."""


class Command(NamedTuple):
    """A command, run in the bundle's directory, and environment variables that it needs."""

    argv: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), shlex.join(self.argv)])


def commands(bundle: Bundle, profile: BuiltProfile) -> list[Command]:
    """`run`, `inspect` and `convert` for the graphs of one budget: portable, and of every target."""
    found = [Command(["polygraphy", "inspect", "model", "onnx/decoder.onnx"], {})]
    graphs = ["onnx/decoder.onnx"]
    if profile.budget < 1 and (bundle.root / "onnx/compressor.onnx").exists():
        graphs.append("onnx/compressor.onnx")
    conversions = []
    for name, record in bundle.manifest.targets.items():
        if not isinstance(record, TensorRTRecord):
            graphs.append(record.decoder)
            continue
        for built in record.budgets:
            # Plugin nodes have no body for ONNX Runtime, and bfloat16 has no kernels there.
            if built.contract.budget == profile.budget and not record.plugins:
                paths = {engine.phase: engine.onnx for engine in built.engines}
                graphs += [path for path in paths.values() if record.dtype != "bfloat16"]
                rtx = {RTX_ENVIRONMENT: "1"} if name == "tensorrt-rtx" else {}
                conversions += [
                    Command(_convert(paths[graph.phase], built.contract, number, bool(rtx)), rtx)
                    for number, graph in enumerate(built.contract.graphs)
                ]
    found += [Command(["polygraphy", "run", path, "--onnxrt", *_inputs(bundle, profile, path)], {}) for path in graphs]
    return found + conversions


def _inputs(bundle: Bundle, profile: BuiltProfile, path: str) -> list[str]:
    """`--input-shapes` and `--val-range` for a graph's inputs."""
    import onnx

    facts, method = bundle.manifest.model, bundle.manifest.method
    graph = onnx.load(bundle.root / path, load_external_data=False).graph
    sizes = {
        "batch": 1,
        "sequence": min(ROWS, profile.prefill_chunk),
        "rows": 1,
        "capacity": profile.capacity,
        "levels": len(profile.thresholds[0]),
        "cache_rows": facts.kv_heads,
    }
    shapes = {
        value.name: [sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    if "input_ids" in shapes:
        rows = shapes["input_ids"][1]
        ranges = {
            "input_ids": (0, facts.vocab_size - 1),
            "position_ids": (0, facts.max_position - 1),
            "logits_index": (0, rows - 1),
            "length": (0, profile.capacity - rows),
        }
    else:
        ranges = {
            "length": (profile.capacity, profile.capacity),
            "slot_position": (0, facts.max_position - 1),
            "slot_chunk": (0, profile.capacity),
            "target": (profile.target, profile.target),
            "sinks": (method.sinks, method.sinks),
            "recent": (method.recent_slots(profile.target),) * 2,
        }
    given = [f"{name}:{_shape(shape)}" for name, shape in shapes.items()]
    bounds = [f"{name}:[{low},{high}]" for name, (low, high) in ranges.items() if name in shapes]
    return ["--input-shapes", *given, "--val-range", *bounds]


def _convert(path: str, contract: StaticBudgetContract, number: int, rtx: bool) -> list[str]:
    """`convert` with the optimization profiles of the contract."""
    argv = ["polygraphy", "convert", path, "-o", f"{Path(path).stem}.plan"]
    if rtx:
        argv += ["--compute-capabilities", "8.6"]
    for profile in contract.graphs[number].profiles:
        for which, option in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
            argv += [option, *(f"{name}:{_shape(sizes[which])}" for name, sizes in profile.shapes.items())]
    return argv


def _shape(sizes: list[int] | tuple[int, ...]) -> str:
    return f"[{','.join(map(str, sizes))}]"

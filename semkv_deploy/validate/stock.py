"""Command lines that give a bundle's files to stock Polygraphy.

Its random inputs mean nothing to a model, but shapes and index ranges must be right: a `length` beyond the capacity, or
a `logits_index` beyond the rows, is refused. `run` and `inspect` need nothing else; `convert` needs TensorRT-RTX as the
module `tensorrt_rtx` (pip install tensorrt-rtx-cu13).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from semkv_deploy.passes.lower_native import folded_rows

if TYPE_CHECKING:
    from semkv_deploy.bundle import Bundle
    from semkv_deploy.bundle.contract import Contract, GraphContract

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


def commands(bundle: Bundle, budget: float) -> list[Command]:
    """`run`, `inspect` and `convert` for the graphs of one budget: portable, and of every target."""
    portable = bundle.portable(budget).contract
    found = [Command(["polygraphy", "inspect", "model", portable.decoders[0].onnx], {})]
    graphs = [(portable, graph) for graph in portable.graphs]
    conversions = []
    for name, record in bundle.manifest.targets.items():
        contract = next((built.contract for built in record.budgets if built.contract.budget == budget), None)
        # Plugin nodes have no body for ONNX Runtime, bfloat16 no kernels there; Polygraphy registers no library.
        if contract is None or record.plugin_operators or contract.native is not None:
            continue
        if not record.on_gpu:
            graphs += [(contract, graph) for graph in contract.decoders]
            continue
        graphs += [(contract, graph) for graph in contract.graphs if contract.dtype != "bfloat16"]
        rtx = {RTX_ENVIRONMENT: "1"} if name == "tensorrt-rtx" else {}
        conversions += [Command(_convert(graph, bool(rtx)), rtx) for graph in contract.graphs]
    runs = [["polygraphy", "run", graph.onnx, "--onnxrt", *_inputs(contract, graph)] for contract, graph in graphs]
    return [*found, *(Command(argv, {}) for argv in runs), *conversions]


def _inputs(contract: Contract, graph: GraphContract) -> list[str]:
    """`--input-shapes` and `--val-range` for a graph's inputs."""
    groups, room = contract.cache.groups, contract.make_room
    chosen = groups[graph.groups[0]]
    sizes = {
        "batch": contract.batch or 1,
        "sequence": min(ROWS, contract.prefill_chunk),
        "rows": 1,
        "capacity": chosen.capacity,
        **{name: size for tables in contract.tables for name, size in (("blocks", tables.most), ("closed", 1))},
        "levels": room.levels if room is not None else 0,
        **{group.symbol: group.capacity for group in groups},
        **{folded_rows(count): (contract.batch or 1) * count for count in range(1, contract.kv_heads + 1)},
    }
    if graph.phase != "compressor" and contract.batch is not None:
        sizes.update(batch=1, **{folded_rows(count): count for count in range(1, contract.kv_heads + 1)})
    shapes = {
        tensor.name: [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        for tensor in graph.inputs
    }
    context, capacity = contract.max_context, chosen.capacity
    if graph.phase != "compressor":
        rows = shapes["input_ids"][1]
        ranges = {
            "input_ids": (0, contract.vocab_size - 1),
            "position_ids": (0, context - 1),
            "logits_index": (0, rows - 1),
            "length": (0, min(group.capacity for group in groups) - rows),
            **{tables.input: (0, 0) for tables in contract.tables},
        }
    elif contract.tables:
        ranges = {"block_start": (0, 0), "block_length": (1, 1), "block_number": (0, 0)}
    elif room is None:
        # Of a program whose host names the slots that stay.
        columns = {column.name: (0, context - 1) for column in contract.cache.slot_columns}
        ranges = {"length": (capacity, capacity), "keep_index": (0, capacity - 1), **columns}
    else:
        number = graph.groups[0]
        keep, sinks = room.keep_slots[number], cast("int", room.by_group["sinks"][number])
        ranges = {
            "length": (capacity, capacity),
            "slot_position": (0, context - 1),
            "slot_chunk": (0, capacity),
            "slot_block": (0, capacity),
            "target": (keep, keep),
            "sinks": (sinks, sinks),
            "recent": (max(int(room.recent_share * keep), room.recent_least),) * 2,
        }
    given = [f"{name}:{_shape(shape)}" for name, shape in shapes.items()]
    bounds = [f"{name}:[{low},{high}]" for name, (low, high) in ranges.items() if name in shapes]
    return ["--input-shapes", *given, "--val-range", *bounds]


def _convert(graph: GraphContract, rtx: bool) -> list[str]:
    """`convert` with the optimization profiles of the contract."""
    argv = ["polygraphy", "convert", graph.onnx, "-o", f"{Path(graph.onnx).stem}.plan"]
    if rtx:
        argv += ["--compute-capabilities", "8.6"]
    for profile in graph.profiles:
        for which, option in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
            argv += [option, *(f"{name}:{_shape(sizes[which])}" for name, sizes in profile.shapes.items())]
    return argv


def _shape(sizes: list[int] | tuple[int, ...]) -> str:
    return f"[{','.join(map(str, sizes))}]"

"""Runs libsemkv_onnxruntime_cuda.so's operators in ONNX Runtime on this machine's GPU, against the PyTorch references.

    python plugins/gpu_check/onnxruntime_check.py --library build/plugins-gpu/libsemkv_onnxruntime_cuda.so

Started by scripts/gpu_check.sh where onnx and onnxruntime-gpu are installed. Inputs and outputs are torch's, in the
GPU's memory, bound by address; caches in place. `--device cpu` runs the emulated library. Exit status: 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import block_cases  # noqa: E402
import compaction_cases  # noqa: E402
import nexus_cases  # noqa: E402

from semkv_deploy.ops import (  # noqa: E402
    SPECS,
    compact_cache,
    semantic_block_map,
    semantic_block_select,
    semantic_cluster,
)

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
TYPES = {torch.float32: 1, torch.int8: 3, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""ONNX's numbers."""

Tensors = tuple[torch.Tensor, ...]


class Node:
    """A session of one node, for tensors of given types."""

    def __init__(self, library: Path, device: str, name: str, options: Sequence[str], types: Sequence[torch.dtype]):
        self.library, self.device, self.types = library, device, types
        self.spec = SPECS[name].with_options(*options)
        self.name = "_".join((name, *options))

    def run(self, inputs: Tensors, outputs: Tensors, attributes: dict[str, float]) -> None:
        """Runs it; outputs may be inputs."""
        import onnxruntime
        from onnx import helper

        node = helper.make_node(self.name, self.spec.input_names, self.spec.output_names, domain="semkv", **attributes)
        infos = [
            helper.make_tensor_value_info(tensor.name, TYPES[given.dtype], list(given.shape))
            for tensor, given in zip((*self.spec.inputs, *self.spec.outputs), (*inputs, *outputs), strict=True)
        ]
        graph = helper.make_graph([node], "node", infos[: len(inputs)], infos[len(inputs) :])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("semkv", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.register_custom_ops_library(str(self.library))
        provider = PROVIDERS[self.device]
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=[provider])
        if provider not in session.get_providers():
            raise RuntimeError(f"ONNX Runtime made a session without {provider}")
        binding = session.io_binding()
        for info, given in zip(infos, (*inputs, *outputs), strict=True):
            bind = binding.bind_input if info in infos[: len(inputs)] else binding.bind_output
            bind(info.name, self.device, 0, TYPES[given.dtype], tuple(given.shape), given.data_ptr())
        if self.device == "cuda":
            torch.cuda.synchronize()
        session.run_with_iobinding(binding)


def run(
    library: Path, device: str, name: str, options: Sequence[str], inputs: Tensors, want: Tensors, **attributes: Any
):
    """The node's outputs on the CPU: those that continue an input in its buffer, the others full of 7 before."""
    node = Node(library, device, name, options, [tensor.dtype for tensor in inputs])
    given = dict(zip(node.spec.input_names, (tensor.to(device).contiguous().clone() for tensor in inputs), strict=True))
    outputs = []
    for output, expected in zip(node.spec.output_names, want, strict=True):
        source = output.removesuffix("_out")
        in_place = output.endswith("_out") and source in given and source != "length"
        # What a reference gives in float64 has the caches' type in the node.
        dtype = expected.dtype if not expected.is_floating_point() else inputs[0].dtype
        if output in ("slot_bias_out", "attention_mass"):
            dtype = torch.float32
        outputs.append(given[source] if in_place else torch.full(expected.shape, 7, dtype=dtype, device=device))
    node.run(tuple(given.values()), tuple(outputs), attributes)
    return tuple(tensor.cpu() for tensor in outputs)


def close(got: Tensors, want: Tensors, tolerance: float) -> list[str]:
    """Which outputs differ: integers by a bit, others beyond the tolerance."""
    return [
        f"output {i}"
        for i, (a, b) in enumerate(zip(got, want, strict=True))
        if not (
            torch.equal(a, b)
            if not a.is_floating_point()
            else torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
        )
    ]


def attention(library: Path, device: str, seed: int) -> list[str]:
    inputs, options, attributes = nexus_cases.option_case(seed)
    if any(tensor.dtype == torch.float8_e4m3fn for tensor in inputs):
        return []  # no form for ONNX Runtime
    want = nexus_cases.option_reference(inputs, options, attributes)
    mass = attributes.pop("mass")
    names = ["indexed"] * ("slot_index" in options) + ["int8"] * ("key_scale" in options) + ["mass"] * mass
    # The reference's outputs: the caches of codes keep their type.
    got = run(library, device, "NexusAttention", names, (*inputs, *options.values()), want, **attributes)
    return nexus_cases.differences(got, want, mass)


def compaction(library: Path, device: str, seed: int) -> list[str]:
    inputs = compaction_cases.compact_case(seed)
    want = compact_cache.reference(*inputs)
    return close(run(library, device, "CompactCache", (), inputs, want), want, 0.0)


def clusters(library: Path, device: str, seed: int) -> list[str]:
    inputs, span = compaction_cases.cluster_case(seed)
    want = semantic_cluster.reference(*inputs, span=span)
    got = run(library, device, "SemanticCluster", (), inputs, want, span=span)
    return close(got, want, nexus_cases.TOLERANCE[inputs[0].dtype])


def block_map(library: Path, device: str, seed: int) -> list[str]:
    inputs, attributes = block_cases.map_case(seed)
    want = semantic_block_map.reference(*inputs, **attributes)
    got = run(library, device, "SemanticBlockMap", (), inputs, want, **attributes)
    return close(got, want, nexus_cases.TOLERANCE[inputs[0].dtype])


def block_select(library: Path, device: str, seed: int) -> list[str]:
    inputs, attributes = block_cases.select_case(seed)
    want = semantic_block_select.reference(*inputs, **attributes)
    return close(run(library, device, "SemanticBlockSelect", (), inputs, want, **attributes), want, 0.0)


CASES: dict[str, Callable[[Path, str, int], list[str]]] = {
    "NexusAttention": attention,
    "CompactCache": compaction,
    "SemanticCluster": clusters,
    "SemanticBlockMap": block_map,
    "SemanticBlockSelect": block_select,
}


def failures(library: Path, device: str, seeds: Sequence[int]) -> Iterator[str]:
    """What is wrong, case by case."""
    for name, check in CASES.items():
        for seed in seeds:
            try:
                wrong = check(library, device, seed)
            except Exception as error:
                wrong = [f"{type(error).__name__}: {str(error)[:300]}"]
            if wrong:
                yield f"{name} seed {seed}: {', '.join(wrong)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every failure, then a line with how many cases there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--device", choices=PROVIDERS, default="cuda")
    parser.add_argument("--cases", type=int, default=44, help="of each operator")
    chosen = parser.parse_args(arguments)
    seeds = range(1, chosen.cases + 1)
    wrong = list(failures(chosen.library, chosen.device, seeds))
    print("\n".join(wrong))
    print(f"{len(CASES) * len(seeds)} cases in ONNX Runtime on {chosen.device}, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

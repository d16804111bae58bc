"""Child process of test_kernels.py: runs random cases on the emulated kernels under the address sanitizer.

Started with libasan preloaded. Prints one JSON line: the number of cases and the description of every failure.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins" / "gpu_check")]

import bindings  # noqa: E402
import compaction_cases  # noqa: E402
import nexus_cases  # noqa: E402

from semkv_deploy.ops import compact_cache, nexus_attention, semantic_cluster  # noqa: E402


@contextmanager
def unreadable(regions: list[tuple[int, int]]) -> Iterator[None]:
    """Memory [begin, end) that the sanitizer reports any access to. Starts are rounded up to its 8-byte grain."""
    runtime = ctypes.CDLL(None)
    regions = [((begin + 7) // 8 * 8, end) for begin, end in regions if end - begin >= 8]
    for begin, end in regions:
        runtime.__asan_poison_memory_region(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))
    try:
        yield
    finally:
        for begin, end in regions:
            runtime.__asan_unpoison_memory_region(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))


def dead_regions(
    keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, ends: list[int]
) -> list[tuple[int, int]]:
    """Slots from each row's `ends` on, which NexusAttention must not touch: its cost is that of the live slots."""
    regions = []
    for tensor in (keys, values, bias):
        slot_bytes = tensor.stride(2) * tensor.element_size()
        for b, end in enumerate(ends):
            for h in range(tensor.shape[1]):
                begin = tensor[b, h].data_ptr()
                regions.append((begin + end * slot_bytes, begin + tensor.shape[2] * slot_bytes))
    return regions


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def reference(module: Any) -> Any:
    """The operator's reference, called with tensors and attributes packed."""
    return module.reference


def run_nexus(kernels: bindings.Kernels, seed: int) -> str:
    inputs, attributes = nexus_cases.case(seed)
    want = reference(nexus_attention)(*(t if i == 5 else exact(t) for i, t in enumerate(inputs)), **attributes)
    query, key, value, key_cache, value_cache, bias, length = inputs
    keys, values, output = key_cache.clone(), value_cache.clone(), torch.full_like(query, float("nan"))
    params = bindings.nexus_attention_params(query, key, value, keys, values, bias, length, output, **attributes)
    params.max_waves = (0, 1, 4)[seed % 3]
    scratch = kernels.workspace("nexus_attention", params, query.device)
    params.workspace = bindings.pointer(scratch)
    with unreadable(dead_regions(keys, values, bias, [n + query.shape[2] for n in length.tolist()])):
        kernels.call("nexus_attention", params, query.device)
    error = nexus_cases.relative_error(output, want[0])
    same = torch.equal(keys.double(), want[1]) and torch.equal(values.double(), want[2])
    if error <= nexus_cases.TOLERANCE[query.dtype] and same:
        return ""
    return f"{query.dtype} {list(query.shape)} {list(keys.shape)} {length.tolist()} {attributes}: {error:.2e}, {same=}"


def compare(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], tolerance: float) -> list[int]:
    """Indices of the outputs that differ; with tolerance 0 bit for bit."""
    wrong = []
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        close = torch.allclose(exact(a), exact(b), rtol=tolerance, atol=tolerance)
        if not (close if a.is_floating_point() and tolerance else torch.equal(exact(a), exact(b))):
            wrong.append(i)
    return wrong


def run_compact(kernels: bindings.Kernels, seed: int) -> str:
    inputs = compaction_cases.compact_case(seed)
    want = compact_cache.reference(*inputs)
    for in_place in (False, True):
        if wrong := compare(bindings.compact_cache(kernels, inputs, in_place), want, 0.0):
            return f"{in_place=} {list(inputs[0].shape)} keep {list(inputs[3].shape)}: outputs {wrong}"
    return ""


def run_cluster(kernels: bindings.Kernels, seed: int) -> str:
    inputs, span = compaction_cases.cluster_case(seed)
    want = reference(semantic_cluster)(*inputs, span=span)
    tolerance = nexus_cases.TOLERANCE[inputs[0].dtype]
    for in_place in (False, True):
        got = bindings.semantic_cluster(kernels, inputs, span, in_place)
        if wrong := compare(got, want, tolerance):
            return f"{in_place=} {list(inputs[0].shape)} {span=} chunks {list(inputs[4].shape)}: outputs {wrong}"
    return ""


def overflow(kernels: bindings.Kernels) -> None:
    """An output one element too small: the sanitizer must end the process. Shows that the sweep would notice."""
    (query, *rest), attributes = nexus_cases.case(0)
    output = torch.empty(query.numel() - 1)
    params = bindings.nexus_attention_params(query, *rest, output, **attributes)
    scratch = kernels.workspace("nexus_attention", params, query.device)
    params.workspace = bindings.pointer(scratch)
    kernels.call("nexus_attention", params, query.device)


def main() -> None:
    torch.set_num_threads(1)
    kernels = bindings.Kernels(Path(sys.argv[1]))
    if sys.argv[2] == "overflow":
        overflow(kernels)
        return
    run = {"nexus_attention": run_nexus, "compact_cache": run_compact, "semantic_cluster": run_cluster}[sys.argv[2]]
    failures = []
    for seed in range(int(sys.argv[3])):
        kernels.library.semkv_set_schedule(seed)
        if failure := run(kernels, seed):
            failures.append(f"seed {seed}: {failure}")
    print("RESULT " + json.dumps({"cases": int(sys.argv[3]), "failures": failures}))


if __name__ == "__main__":
    main()

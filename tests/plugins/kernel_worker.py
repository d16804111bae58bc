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
import block_cases  # noqa: E402
import compaction_cases  # noqa: E402
import large_cases  # noqa: E402
import nexus_cases  # noqa: E402

from semkv_deploy.ops import (  # noqa: E402
    compact_cache,
    nexus_attention,
    semantic_block_map,
    semantic_block_select,
    semantic_cluster,
)


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


def dead_regions(tensors: list[torch.Tensor], ends: list[int]) -> list[tuple[int, int]]:
    """Slots from each row's `ends` on, which NexusAttention must not touch: its cost is that of the live slots."""
    regions = []
    for tensor in tensors:
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
    params.split_halves = (0, 1, 4)[seed % 3]
    scratch = kernels.workspace("nexus_attention", params, query.device)
    params.workspace = bindings.pointer(scratch)
    with unreadable(dead_regions([keys, values, bias], [n + query.shape[2] for n in length.tolist()])):
        kernels.call("nexus_attention", params, query.device)
    error = nexus_cases.relative_error(output, want[0])
    same = torch.equal(keys.double(), want[1]) and torch.equal(values.double(), want[2])
    if error <= nexus_cases.TOLERANCE[query.dtype] and same:
        return ""
    return f"{query.dtype} {list(query.shape)} {list(keys.shape)} {length.tolist()} {attributes}: {error:.2e}, {same=}"


def unnamed_rows(cache: torch.Tensor, index: torch.Tensor, ends: list[int]) -> list[tuple[int, int]]:
    """Memory of the live rows that slot_index does not name: nothing may read them."""
    row_bytes = cache.stride(2) * cache.element_size()
    return [
        (cache[b, h, slot].data_ptr(), cache[b, h, slot].data_ptr() + row_bytes)
        for b, end in enumerate(ends)
        for h in range(cache.shape[1])
        for slot in set(range(end)) - set(index[b, h].tolist())
    ]


def run_options(kernels: bindings.Kernels, seed: int) -> str:
    inputs, options, attributes = nexus_cases.option_case(seed)
    want = nexus_cases.option_reference(inputs, options, attributes)
    query, key, value, key_cache, value_cache, bias, length = inputs
    keys, values, output = key_cache.clone(), value_cache.clone(), torch.full_like(query, float("nan"))
    given = {name: tensor.clone() for name, tensor in options.items()}
    outputs = (output, keys, values, *(given[name] for name in ("key_scale", "value_scale") if name in given))
    if mass := attributes["mass"]:
        given["mass"] = torch.full_like(bias, float("nan"))
        outputs += (given["mass"],)
    attributes = {name: v for name, v in attributes.items() if name != "mass"} | {"split_halves": (0, 1, 4)[seed % 3]}
    params = bindings.nexus_attention_params(
        query, key, value, keys, values, bias, length, output, **given, **attributes
    )
    scratch = kernels.workspace("nexus_attention", params, query.device)
    params.workspace = bindings.pointer(scratch)
    ends = [n + query.shape[2] for n in length.tolist()]
    scales = [given[name] for name in ("key_scale", "value_scale") if name in given]
    regions = dead_regions([keys, values, bias, *scales], ends)
    if "slot_index" in given:
        for cache in (keys, values):
            regions += unnamed_rows(cache, given["slot_index"], length.tolist())
    with unreadable(regions):
        kernels.call("nexus_attention", params, query.device)
    if wrong := nexus_cases.differences(outputs, want, mass):
        shapes = f"{query.dtype} {list(query.shape)} {keys.dtype} {list(keys.shape)} {length.tolist()}"
        return f"{shapes} { ({n: list(t.shape) for n, t in given.items()}) } {attributes}: {', '.join(wrong)}"
    return run_impossible_slot(kernels, inputs, options, attributes, outputs) if "slot_index" in given else ""


def run_impossible_slot(
    kernels: bindings.Kernels, inputs: tuple[Any, ...], options: Any, attributes: Any, clean: tuple[torch.Tensor, ...]
) -> str:
    """One entry of one KV head names a slot that is not there: NaN in that head's output, the rest as it was."""
    length = inputs[6]
    options["slot_index"][-1, -1, -1] = (int(length[-1]), 2**40)[int(length[-1]) % 2]
    got = bindings.nexus_attention(kernels, inputs, options, **attributes)
    group = inputs[0].shape[1] // inputs[1].shape[1]
    same = torch.equal(got[0][:-1], clean[0][:-1]) and torch.equal(got[0][-1, :-group], clean[0][-1, :-group])
    return "" if same and bool(got[0][-1, -group:].isnan().all()) else "an impossible slot is not NaN"


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
        # Keys and values are rounded to their type; biases are float32, whatever it is.
        wrong = compare(got[:2], want[:2], tolerance) + [2 + i for i in compare(got[2:], want[2:], 1e-5)]
        if wrong:
            return f"{in_place=} {list(inputs[0].shape)} {span=} chunks {list(inputs[4].shape)}: outputs {wrong}"
    return ""


def run_block_map(kernels: bindings.Kernels, seed: int) -> str:
    inputs, attributes = block_cases.map_case(seed)
    want = reference(semantic_block_map)(*inputs, **attributes)
    keys, start, length = inputs
    uncovered = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
    for b, n in (length > 0).nonzero().tolist():
        uncovered[b, start[b, n] : start[b, n] + length[b, n]] = False
    row_bytes = keys.stride(2) * keys.element_size()
    rows = [
        keys[b, h].data_ptr() + slot * row_bytes
        for b, slot in uncovered.nonzero().tolist()
        for h in range(len(keys[b]))
    ]
    with unreadable([(begin, begin + row_bytes) for begin in rows]):
        got = bindings.semantic_block_map(kernels, inputs, **attributes)
    # Smallest and largest values are exact; a mean is one float32 sum, rounded once.
    tolerance = nexus_cases.TOLERANCE[keys.dtype] if attributes["vectors"] == 1 else 0.0
    if wrong := compare(got, want, tolerance):
        return f"{list(keys.shape)} {keys.dtype} {list(start.shape)} {attributes}: outputs {wrong}"
    return ""


def run_block_select(kernels: bindings.Kernels, seed: int) -> str:
    inputs, attributes = block_cases.select_case(seed)
    want = reference(semantic_block_select)(*inputs, **attributes)
    representatives, block_slots = inputs[1:3]
    regions = []
    for b, count in enumerate(inputs[3].tolist()):
        for row in (block_slots[b], *representatives[b]):
            block_bytes = row[0].numel() * row.element_size()
            regions.append((row.data_ptr() + count * block_bytes, row.data_ptr() + len(row) * block_bytes))
    with unreadable(regions):
        got = bindings.semantic_block_select(kernels, inputs, **attributes)
    if compare(got, want, 0.0):
        return f"{list(inputs[0].shape)} {list(representatives.shape)} {list(block_slots.shape)} {attributes}"
    return ""


def impossible(kernels: bindings.Kernels) -> None:
    """What the kernels' headers promise for blocks and counts that cannot be."""
    keys = torch.randn(1, 2, 64, 64)
    start, length = torch.tensor([[60, -1, 0, 0, 3]]), torch.tensor([[5, 2, 9, -1, 4]])
    vectors, slots = bindings.semantic_block_map(kernels, (keys, start, length), 2, 8)
    assert bool(vectors[:, :, :4].isnan().all()) and bool((slots[:, :4] == 64).all())
    assert slots[0, 4].tolist() == [3, 4, 5, 6, -1, -1, -1, -1] and bool(vectors[:, :, 4].isfinite().all())
    query, pinned = torch.ones(1, 2, 1, 64), torch.tensor([[0, 0, 0, 0, 1]])
    inputs = (query, vectors, slots, torch.tensor([5]), pinned)
    # The impossible blocks' NaN comes right behind what is pinned: their impossible slot is chosen, not lost.
    for reduce_max in (0, 1):
        (chosen,) = bindings.semantic_block_select(kernels, inputs, 20, reduce_max)
        assert [sorted(row) for row in chosen[0].tolist()] == [[3, 4, 5, 6, *[64] * 16]] * 2
    for count in (-1, 6, 2**40):
        (chosen,) = bindings.semantic_block_select(kernels, (*inputs[:3], torch.tensor([count]), pinned), 20, 0)
        assert bool((chosen == 2**31 - 1).all())


def chain(kernels: bindings.Kernels) -> None:
    """Map, select and attend over the chosen slots. With room for all blocks that is attention over the whole cache;
    with less it finds the block that the query is about; an impossible block ends in NaN."""
    torch.manual_seed(0)
    capacity, live, wanted = 160, 150, 77
    lengths = torch.tensor([[40, 24, 32, 30, 24]] * 2)
    # Keys of one block are alike, as those of one subject are.
    alike = torch.randn(2, 2, 6, 64).repeat_interleave(torch.tensor([40, 24, 32, 30, 24, 10]), dim=2)
    keys, values = alike + 0.3 * torch.randn(2, 2, capacity, 64), torch.randn(2, 2, capacity, 64)
    starts, count = lengths.cumsum(-1) - lengths, torch.tensor([5, 5])
    pinned = torch.tensor([[1, 0, 0, 0, 1]] * 2)
    query = keys[:, :, wanted : wanted + 1].repeat_interleave(4, dim=1)
    new = [torch.randn(2, 2, 1, 64) for _ in range(2)]
    state = (query, *new, keys, values, torch.zeros(2, 2, capacity), torch.tensor([live, live]))
    dense = bindings.nexus_attention(kernels, state)[0]
    for width, tolerance in ((live, 1e-5), (200, 1e-5), (100, 0.1)):
        blocks = bindings.semantic_block_map(kernels, (keys, starts, lengths), 2, 40)
        (slots,) = bindings.semantic_block_select(kernels, (query, *blocks, count, pinned), width, 0)
        assert bool((slots == wanted).any(-1).all())
        sparse = bindings.nexus_attention(kernels, state, {"slot_index": slots})[0]
        error = nexus_cases.relative_error(sparse, dense)
        assert error < tolerance and (width >= live or error > 1e-5), (width, error)
    starts[1, 2] = capacity
    blocks = bindings.semantic_block_map(kernels, (keys, starts, lengths), 2, 40)
    (slots,) = bindings.semantic_block_select(kernels, (query, *blocks, count, pinned), 100, 0)
    sparse = bindings.nexus_attention(kernels, state, {"slot_index": slots})[0]
    assert bool(sparse[0].isfinite().all()) and bool(sparse[1].isnan().all())


def large(kernels: bindings.Kernels) -> None:
    """A cache of several tiles of moved rows, blocks of places and rounds of seeds: merged in place, where rows of a
    later tile must not have been overwritten by an earlier one, and not."""
    for schedule, in_place in ((0, True), (1, True), (2, False)):
        kernels.library.semkv_set_schedule(schedule)
        inputs = large_cases.cluster_inputs(2304, 2, 64, 4, torch.device("cpu"))
        got = bindings.semantic_cluster(kernels, inputs, 64, in_place)
        wrong = large_cases.cluster_failures(inputs, got, 64)
        assert not wrong and int(got[5]) >= 1, (schedule, in_place, wrong, got[5])
    # More than one round of the prefix sums of CompactCache's plan, and values through the staging buffer after keys.
    failures = large_cases.compact(kernels, torch.device("cpu"), 4200)["failures"]
    assert not failures, failures


def impossible_lengths(kernels: bindings.Kernels) -> None:
    """A row of SemanticCluster whose length no cache has stays as it is and says so; the others are as ever."""
    inputs, span = compaction_cases.cluster_case(4)
    three = [t if i == 5 else t.repeat(3, *[1] * (t.dim() - 1)) for i, t in enumerate(inputs)]
    want = bindings.semantic_cluster(kernels, tuple(three), span, False)
    for bad in (inputs[0].shape[2] + 1, -1, 2**32 + 5, -(2**40)):
        three[3][1] = bad
        for in_place in (False, True):
            got = bindings.semantic_cluster(kernels, tuple(three), span, in_place)
            assert all(torch.equal(a[::2], b[::2]) for a, b in zip(got, want, strict=True))
            assert all(torch.equal(a[1], b[1]) for a, b in zip(got[:3], three[:3], strict=True))
            assert got[3][1] == -1 and got[5][1] == -1 and bool((got[4][1] == -1).all())


def architectures(kernels: bindings.Kernels) -> None:
    """Which calls the architecture decides about: several query rows of 16 bits. The two kernels round differently, so
    that not one bit differing means one kernel. Both are within the tolerance: see the sweeps."""
    torch.manual_seed(0)
    for dtype in nexus_cases.DTYPES:
        for code in (None, "int8", "fp8"):
            for heads in (2, 4):
                query = torch.randn(1, heads, 1, 64).to(dtype)
                key, value = torch.randn(2, 1, 2, 1, 64).to(dtype)
                caches, options = [torch.randn(1, 2, 96, 64) for _ in range(2)], {}
                for i, name in enumerate(("key_scale", "value_scale")):
                    if code is None:
                        caches[i] = caches[i].to(dtype)
                    else:
                        caches[i], options[name] = nexus_attention.quantize(caches[i], code)
                state = (query, key, value, *caches, torch.zeros(1, 2, 96), torch.tensor([80]))
                got = []
                for architecture in (75, 80):
                    kernels.library.semkv_set_architecture(architecture)
                    got.append(bindings.nexus_attention(kernels, state, options)[0])
                tensor_cores = heads == 4 and dtype != torch.float32
                assert torch.equal(*got) != tensor_cores, (dtype, code, heads)


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
    if sys.argv[2] == "large":
        large(kernels)
        return
    if sys.argv[2] == "lengths":
        impossible_lengths(kernels)
        return
    if sys.argv[2] == "architectures":
        architectures(kernels)
        return
    if sys.argv[2] == "blocks":
        impossible(kernels)
        chain(kernels)
        return
    run = {
        "nexus_attention": run_nexus,
        "nexus_attention_options": run_options,
        "compact_cache": run_compact,
        "semantic_cluster": run_cluster,
        "semantic_block_map": run_block_map,
        "semantic_block_select": run_block_select,
    }[sys.argv[2]]
    failures = []
    kernels.library.semkv_set_architecture(int(sys.argv[4]))
    for seed in range(int(sys.argv[3])):
        kernels.library.semkv_set_schedule(seed)
        if failure := run(kernels, seed):
            failures.append(f"seed {seed}: {failure}")
    print("RESULT " + json.dumps({"cases": int(sys.argv[3]), "failures": failures}))


if __name__ == "__main__":
    main()

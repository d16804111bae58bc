"""Checks and times the kernels on this machine's GPU: torch, one library built by nvcc, no TensorRT, no network.

    python plugins/gpu_check/check.py --library build/plugins-gpu/libsemkv_kernels.so --json result.json

Started by scripts/gpu_check.sh. `--sweep-only N` runs only N correctness cases (for compute-sanitizer); `--dry-run`
runs everything in miniature on a CPU with the emulated library, to keep this script tested where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bindings  # noqa: E402
import block_cases  # noqa: E402
import compaction_cases  # noqa: E402
import flashinfer_times  # noqa: E402
import nexus_cases  # noqa: E402
import option_times  # noqa: E402
import timing  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from semkv_deploy.ops import (  # noqa: E402
    compact_cache,
    nexus_attention,
    semantic_block_map,
    semantic_block_select,
    semantic_cluster,
)

TIME_LIMIT_S = 330.0
"""After this long no further case is started; the cases left out are listed as not measured."""


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def reference(module: Any) -> Any:
    """The operator's reference, called with tensors and attributes packed."""
    return module.reference


def sweep(kernels: bindings.Kernels, device: torch.device, cases: int) -> dict[str, Any]:
    """Random cases of the operators against the references on the CPU; outputs start poisoned."""
    failures: list[str] = []
    worst: dict[str, float] = {}
    for seed in range(cases):
        inputs, attributes = nexus_cases.case(seed)
        want = reference(nexus_attention)(*(t if i == 5 else exact(t) for i, t in enumerate(inputs)), **attributes)
        got = bindings.nexus_attention(kernels, tuple(t.to(device) for t in inputs), **attributes)
        error = nexus_cases.relative_error(got[0].cpu(), want[0])
        dtype = str(inputs[0].dtype)
        worst[dtype] = max(worst.get(dtype, 0.0), error)
        same = all(torch.equal(exact(a.cpu()), b) for a, b in zip(got[1:], want[1:], strict=True))
        if error > nexus_cases.TOLERANCE[inputs[0].dtype] or not same:
            failures.append(f"NexusAttention seed {seed}: error {error:.2e}, caches equal: {same}")
    failures += option_times.option_failures(kernels, device, cases // 4)
    for seed in range(cases // 4):
        compact_inputs = compaction_cases.compact_case(seed)
        cluster_inputs, span = compaction_cases.cluster_case(seed)
        compact_want = compact_cache.reference(*compact_inputs)
        cluster_want = reference(semantic_cluster)(*cluster_inputs, span=span)
        tolerance = nexus_cases.TOLERANCE[cluster_inputs[0].dtype]
        for in_place in (False, True):
            compact_got = bindings.compact_cache(kernels, tuple(t.to(device) for t in compact_inputs), in_place)
            if not all(torch.equal(a.cpu(), b) for a, b in zip(compact_got, compact_want, strict=True)):
                failures.append(f"CompactCache seed {seed}, in place {in_place}")
            cluster_got = bindings.semantic_cluster(
                kernels, tuple(t.to(device) for t in cluster_inputs), span, in_place
            )
            for i, (a, b) in enumerate(zip(cluster_got, cluster_want, strict=True)):
                if not torch.allclose(exact(a.cpu()), exact(b), rtol=tolerance, atol=tolerance):
                    failures.append(f"SemanticCluster seed {seed}, in place {in_place}, output {i}")
        map_inputs, map_attributes = block_cases.map_case(seed)
        map_want = reference(semantic_block_map)(*map_inputs, **map_attributes)
        map_got = bindings.semantic_block_map(kernels, tuple(t.to(device) for t in map_inputs), **map_attributes)
        tolerance = nexus_cases.TOLERANCE[map_inputs[0].dtype] if map_attributes["vectors"] == 1 else 0.0
        for i, (a, b) in enumerate(zip(map_got, map_want, strict=True)):
            if not torch.allclose(exact(a.cpu()), exact(b), rtol=tolerance, atol=tolerance):
                failures.append(f"SemanticBlockMap seed {seed}, output {i}")
        select_inputs, select_attributes = block_cases.select_case(seed)
        select_want = reference(semantic_block_select)(*select_inputs, **select_attributes)[0]
        select_got = bindings.semantic_block_select(
            kernels, tuple(t.to(device) for t in select_inputs), **select_attributes
        )[0]
        if not torch.equal(select_got.cpu(), select_want):
            failures.append(f"SemanticBlockSelect seed {seed}")
    return {"cases": cases, "failures": failures, "worst_relative_error": worst}


def decode_case(
    kernels: bindings.Kernels, device: torch.device, heads: tuple[int, int, int], batch: int, slots: int, gb_s: float
) -> dict[str, Any]:
    """One decode step over `slots` slots, and with 50 % and 20 % of them live in the same buffers, against SDPA (flash)
    over all of them."""
    query_heads, kv_heads, head_size = heads
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = torch.float16
    cache_bytes = 2 * batch * kv_heads * slots * head_size * 2
    copies = timing.copies_needed(cache_bytes // 5, device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        copies = min(copies, int(free * 0.8) // cache_bytes)
        if copies < 2:
            return {"not_measured": f"needs {2 * cache_bytes >> 20} MiB of free memory, got {free >> 20}"}
    query = torch.randn(batch, query_heads, 1, head_size, dtype=dtype, device=device)
    fresh = torch.randn(2, batch, kv_heads, 1, head_size, dtype=dtype, device=device)
    bias = torch.zeros(batch, kv_heads, slots, device=device)
    caches = [torch.randn(2, batch, kv_heads, slots, head_size, dtype=dtype, device=device) for _ in range(copies)]
    output = torch.empty_like(query)
    result: dict[str, Any] = {"copies": copies}
    for kept in (1.0, 0.5, 0.2):
        live = max(1, int(slots * kept))
        length = torch.full((batch,), live - 1, dtype=torch.int64, device=device)
        params = [
            bindings.nexus_attention_params(query, fresh[0], fresh[1], c[0], c[1], bias, length, output) for c in caches
        ]
        scratch = kernels.workspace("nexus_attention", params[0], device)
        for p in params:
            p.workspace = bindings.pointer(scratch)
        calls = [lambda p=p: kernels.call("nexus_attention", p, device) for p in params]
        ms = timing.milliseconds(calls, device)
        read = 2 * batch * kv_heads * live * head_size * 2 + 4 * batch * kv_heads * live
        result[f"ms_{kept:g}"] = ms
        result[f"share_{kept:g}"] = read / ms / 1e6 / gb_s
    grouped = query_heads != kv_heads

    def flash(cache: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=grouped)

    try:
        result["ms_flash"] = timing.milliseconds([lambda c=c: flash(c) for c in caches], device)
        result["speedup_0.2"] = result["ms_flash"] / result["ms_0.2"]
    except RuntimeError as error:
        result["ms_flash"], result["flash_error"] = None, str(error).splitlines()[0]
    return result | flashinfer_times.flashinfer_times(query, caches)


def compaction_times(kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float) -> dict[str, Any]:
    """SemanticCluster and CompactCache on one layer of 8 KV heads of 128, float16, beside that layer's prefill."""
    heads, head_size, levels = 8, 128, 8
    shape = (1, heads, slots, head_size)
    caches = [torch.randn(shape, dtype=torch.float16, device=device) for _ in range(2)]
    # Neighbours alike, so that chunks of 16 slots merge to about a fifth at the first level that fits.
    caches[0] = (caches[0] + 3 * caches[0][:, :, ::16].repeat_interleave(16, dim=2)[:, :, :slots]).contiguous()
    bias = torch.zeros(1, heads, slots, device=device)
    chunk = (torch.arange(slots, device=device) // 16).expand(1, 1, levels, slots).contiguous()
    length = torch.tensor([slots], device=device)
    thresholds = torch.linspace(0.95, 0.3, levels, device=device)
    target = torch.tensor([slots // 5], device=device)
    keep = torch.full((1, 1, slots), -1, dtype=torch.int64, device=device)
    keep[..., : slots // 5] = torch.arange(slots // 5, device=device) * 5
    moved = 2 * heads * (slots + slots // 5 + slots * 4 // 5) * head_size * 2
    result: dict[str, Any] = {}
    cluster_inputs = (*caches, bias, length, chunk, thresholds, target)
    # Timed with outputs of their own: in place, the second run would find a compacted cache.
    result["cluster_ms"] = timing.milliseconds(
        [lambda: bindings.semantic_cluster(kernels, cluster_inputs, 64, False)] * 2, device
    )
    got = bindings.semantic_cluster(kernels, cluster_inputs, 64, False)
    result["cluster_length"], result["cluster_level"] = int(got[3]), int(got[5])
    result["compact_ms"] = timing.milliseconds(
        [lambda: bindings.compact_cache(kernels, (*caches, bias, keep), False)] * 2, device
    )
    # The floor: read what is kept or merged, write the whole capacity, keys and values. The times above include the
    # clones and the poisoning of the binding, so they are upper bounds.
    result["floor_ms"] = moved / gb_s / 1e6
    if device.type == "cuda":
        result["layer_prefill_ms"] = layer_prefill(slots, device)
        result["cluster_share_of_prefill"] = result["cluster_ms"] / result["layer_prefill_ms"]
    return result


def block_times(kernels: bindings.Kernels, device: torch.device, slots: int, gb_s: float) -> dict[str, Any]:
    """SemanticBlockMap over a whole layer and SemanticBlockSelect for one decode step: 8 KV heads of 128, groups of 4,
    float16, blocks of 32. Times include the binding's allocation of outputs and workspace."""
    heads, head_size, length, longest = 8, 128, 32, 40
    blocks, width = slots // length, max(slots // 16, longest)
    keys = torch.randn(1, heads, slots, head_size, dtype=torch.float16, device=device)
    start = (torch.arange(blocks, device=device) * length)[None]
    lengths, pinned = torch.full_like(start, length), torch.zeros_like(start)
    pinned[:, [0, -2, -1]] = 1
    query = torch.randn(1, 4 * heads, 1, head_size, dtype=torch.float16, device=device)
    count = torch.tensor([blocks], device=device)
    mapped = bindings.semantic_block_map(kernels, (keys, start, lengths), 2, longest)
    select_inputs = (query, *mapped, count, pinned)
    result: dict[str, Any] = {"blocks": blocks, "width": width}
    result["map_ms"] = timing.milliseconds(
        [lambda: bindings.semantic_block_map(kernels, (keys, start, lengths), 2, longest)] * 2, device
    )
    result["select_ms"] = timing.milliseconds(
        [lambda: bindings.semantic_block_select(kernels, select_inputs, width, 0)] * 2, device
    )
    vectors = heads * blocks * 2 * head_size * 2
    result["map_floor_ms"] = (keys.numel() * 2 + vectors + 8 * blocks * longest) / gb_s / 1e6
    result["select_floor_ms"] = (vectors + 8 * blocks * longest + 8 * heads * width) / gb_s / 1e6
    return result


def layer_prefill(tokens: int, device: torch.device) -> float:
    """Matrix products and attention of one Llama-8B layer (hidden 4096, 32/8 heads of 128, FFN 14336), in ms."""
    x = torch.randn(tokens, 4096, dtype=torch.float16, device=device)
    weights = [torch.randn(4096, n, dtype=torch.float16, device=device) for n in (4096 + 2 * 1024, 4096, 2 * 14336)]
    down = torch.randn(14336, 4096, dtype=torch.float16, device=device)
    q = torch.randn(1, 32, tokens, 128, dtype=torch.float16, device=device)
    kv = torch.randn(1, 8, tokens, 128, dtype=torch.float16, device=device)

    def run() -> None:
        for w in weights:
            y = x @ w
        y[:, :14336] @ down
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)

    return timing.milliseconds([run], device, repeats=3)


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = ("heads", "batch", "slots", "ms_1", "share_1", "ms_0.5", "ms_0.2", "share_0.2", "ms_flash", "speedup_0.2")
    columns += ("ms_flashinfer",) if any(row.get("ms_flashinfer") is not None for row in rows) else ()
    print("  ".join(f"{c:>11}" for c in columns))
    for row in rows:
        cells = [row.get(c, "-") for c in columns]
        print("  ".join(f"{c:>11.4f}" if isinstance(c, float) else f"{c!s:>11}" for c in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep-only", type=int, default=0, metavar="N")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cpu" if options.dry_run else "cuda")
    kernels = bindings.Kernels(options.library)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "none: dry run on a CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": "float16",
    }
    cases = options.sweep_only or (8 if options.dry_run else 160)
    report["sweep"] = sweep(kernels, device, cases)
    print(f"sweep: {cases} cases, {len(report['sweep']['failures'])} failures", flush=True)
    for failure in report["sweep"]["failures"]:
        print("  " + failure)
    if not options.sweep_only:
        gb_s = report["copy_gb_s"] = timing.copy_bandwidth(device)
        report["decode"] = rows = []
        sizes = (64,) if options.dry_run else (1024, 8192, 32768, 131072)
        batches = (1,) if options.dry_run else (1, 8, 64)
        for heads in ((32, 8, 128), (9, 3, 64)):
            for batch in batches:
                for slots in sizes:
                    row: dict[str, Any] = {"heads": f"{heads[0]}/{heads[1]}x{heads[2]}", "batch": batch, "slots": slots}
                    if time.monotonic() - started > TIME_LIMIT_S:
                        row["not_measured"] = "time limit"
                    else:
                        row |= decode_case(kernels, device, heads, batch, slots, gb_s)
                    rows.append(row)
        report["compaction"] = compaction_times(kernels, device, 128 if options.dry_run else 32768, gb_s)
        print(f"copy bandwidth {gb_s:.0f} GB/s; share = bytes the step must read over time, of that bandwidth")
        report["blocks"] = block_times(kernels, device, 128 if options.dry_run else 32768, gb_s)
        report["options"] = option_times.option_times(kernels, device, 128 if options.dry_run else 32768, gb_s)
        print_table(rows)
        for name in ("compaction", "blocks", "options"):
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in report[name].items()))
    report["seconds"] = round(time.monotonic() - started, 1)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    assert all(math.isfinite(v) for v in report["sweep"]["worst_relative_error"].values())
    return 1 if report["sweep"]["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Timing on a GPU: copy bandwidth, and a call's time over rotating buffers, by CUDA events around a CUDA graph.

On a CPU (the dry run that keeps this code tested) the clock is the host's and the numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def milliseconds(calls: Sequence[Call], device: torch.device, repeats: int = 7) -> float:
    """Median time of one call, in ms. `calls` do the same work on different buffers, so that the L2 cache cannot hold
    what the next one reads; together they are one replay of a CUDA graph, which leaves launch overhead out."""
    for call in calls:
        call()
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e3 / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def copies_needed(bytes_per_call: int, device: torch.device) -> int:
    """Buffers to rotate through so that four L2 caches' worth lies between two uses of one; 2 to 64."""
    return max(2, min(64, -(-4 * l2_bytes(device) // max(bytes_per_call, 1))))


def copy_bandwidth(device: torch.device) -> float:
    """Measured device-to-device copy, bytes read and written, in GB/s."""
    size = 1 << 30 if device.type == "cuda" else 1 << 22
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds([lambda: target.copy_(source)] * 4, device) / 1e6

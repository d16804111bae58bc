"""Timing on a GPU: copy bandwidth, and a call's time over rotating buffers, by CUDA events around a CUDA graph.

On a CPU (the dry run that keeps this code tested) the clock is the host's and the numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

LEAST_MS = 3.0
"""What one timed replay lasts at least: starting a graph takes the host some 10 us, which must not show."""
MOST_NODES = 2000
BUSY_CYCLES = 1_000_000
"""Keeps the GPU busy, about half a millisecond, while the host enqueues what is timed."""


def on_gpu(device: torch.device) -> bool:
    """Whether CUDA's clock, memory and graphs are to be used."""
    return device.type == "cuda"


def capture(calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all calls, `rounds` times over; every call must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """One replay's time between two events; the GPU is kept busy until both and the graph are in its queue."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY_CYCLES)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def milliseconds(calls: Sequence[Call], device: torch.device, repeats: int = 7) -> float:
    """Median time of one call, in ms. `calls` do the same work on different buffers, so that the L2 cache cannot hold
    what the next one reads; they are repeated in one CUDA graph until it lasts LEAST_MS."""
    for call in calls:
        call()
    if not on_gpu(device):
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e3 / len(calls)
    torch.cuda.synchronize()
    graph = capture(calls, 1)
    graph.replay()
    once = max(replay_ms(graph), 1e-3)
    rounds = max(1, min(-int(-LEAST_MS // once), MOST_NODES // len(calls)))
    if rounds > 1:
        graph = capture(calls, rounds)
        graph.replay()
    return statistics.median(replay_ms(graph) for _ in range(repeats)) / (rounds * len(calls))


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if on_gpu(device) else 0


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPU, what torch's allocator keeps for later included; 1 GiB on a CPU."""
    if not on_gpu(device):
        return 1 << 30
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def copies_needed(bytes_per_call: int, device: torch.device) -> int:
    """Buffers to rotate through so that four L2 caches' worth lies between two uses of one; 1 to 64."""
    return max(1, min(64, -(-4 * l2_bytes(device) // max(bytes_per_call, 1))))


def copy_bandwidth(device: torch.device) -> dict[str, float]:
    """Measured device-to-device copies, bytes read and written, in GB/s: the driver's, and a kernel over elements."""
    size = min(1 << 30, free_bytes(device) // 256 * 64) if on_gpu(device) else 1 << 22
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copies: dict[str, Call] = {
        "memcpy": lambda: target.copy_(source),
        "elementwise": lambda: torch.bitwise_not(source, out=target),
    }
    return {name: 2 * size / milliseconds([copy] * 2, device) / 1e6 for name, copy in copies.items()}

"""Child process of test_gpu_check.py: plugins/gpu_check/check.py on CPU tensors that are taken for a GPU's.

torch.cuda's clock, graphs and memory are fakes here, flashinfer too, so that every line of the check runs without a
GPU, on the emulated kernels; what a machine with only torch and numpy lacks cannot be imported. Started with libasan
preloaded. The last argument is a mode: "whole", or "broken": a timer gives NaN and one decode step raises.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins" / "gpu_check"))
for name in ("onnx", "onnxruntime", "transformers", "safetensors", "click", "yaml", "rich", "tokenizers", "polygraphy"):
    sys.modules[name] = None  # type: ignore[assignment]

import check  # noqa: E402
import decode_times  # noqa: E402
import timing  # noqa: E402


class Event:
    """Counts on: every replay takes 1.5 ms."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        assert end is not self
        return 1.5


class Graph:
    """What is captured has run once already."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@contextlib.contextmanager
def graph(captured: Graph) -> Iterator[None]:
    assert isinstance(captured, Graph)
    yield


class Wrapper:
    """flashinfer's, as far as it is used: pages must cover the caches and agree with the plan."""

    def __init__(self, scratch: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "HND" and scratch.dtype == torch.uint8

    def plan(self, *arguments: Any, **types: Any) -> None:
        starts, pages, last, query_heads, kv_heads, head_size, page = arguments
        assert len(starts) - 1 == len(last) and int(starts[-1]) == len(pages)
        self.page_shape = (len(pages), kv_heads, page, head_size)
        self.query_shape = (len(last), query_heads, head_size)

    def run(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert tuple(query.shape) == self.query_shape
        assert all(tuple(cache.shape) == self.page_shape for cache in caches)
        return query


def fake_gpu() -> None:
    """Everything that the check asks of torch.cuda and flashinfer."""
    timing.on_gpu = lambda device: True
    fakes = {
        "CUDAGraph": Graph,
        "graph": graph,
        "Event": Event,
        "_sleep": lambda cycles: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (2 << 30, 4 << 30),
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=30_000),
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    flashinfer = types.ModuleType("flashinfer")
    flashinfer.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    sys.modules["flashinfer"] = flashinfer


def break_something() -> None:
    """A NaN among the timings, and an exception in the first decode step."""
    whole = decode_times.decode

    def decode(*arguments: Any) -> dict[str, Any]:
        if arguments[2] == decode_times.SMALL_CASES[0]:
            raise ValueError("broken on purpose")
        return whole(*arguments) | {"ms_flash": float("nan")}

    decode_times.decode = decode


def main() -> int:
    torch.set_num_threads(1)
    fake_gpu()
    if sys.argv.pop() == "broken":
        break_something()
    status = check.main()
    assert Graph.replays > 0
    return status


if __name__ == "__main__":
    sys.exit(main())

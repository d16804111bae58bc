"""Compressors on libsemkv_onnxruntime.so, as bundles with native operators have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from semkv_deploy.choices import CacheType
from semkv_deploy.methods import Method, SemantiCache
from semkv_deploy.methods.base import STATE
from semkv_deploy.ops.native import narrowed, widened
from semkv_deploy.passes.narrow_caches import narrow_caches
from semkv_deploy.targets.onnxruntime.native import NATIVE_PROGRAMS

from ..methods.matrix import COMPRESSING
from ..methods.test_compressors import CAPACITY, example, facts, reference

LOOSE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "int8": 4e-2}
"""Between values of a size near 1 in a type and what they are in float32."""

NATIVE = {name: m for name, m in COMPRESSING.items() if isinstance(m, SemantiCache) or m.fitted_queries or not m.scores}


def native_graph(method: Method, dtype: CacheType) -> onnx.ModelProto:
    graph = narrow_caches(method.native_compressor(facts()), dtype)
    kept = [function for function in graph.functions if function.name not in NATIVE_PROGRAMS]
    del graph.functions[:]
    graph.functions.extend(kept)
    return graph


def run_native(
    library: Path, method: Method, dtype: CacheType, state: dict[str, np.ndarray], target: list[int], threads: int = 1
) -> dict[str, torch.Tensor]:
    """Outputs, without `_out`; caches in float32."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    options.register_custom_ops_library(str(library))
    model = native_graph(method, dtype).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {
        **{name: torch.from_numpy(array) for name, array in state.items()},
        "thresholds": torch.tensor(THRESHOLDS),
        "target": torch.tensor(target),
        "recent": torch.tensor([method.recent_slots(slots) for slots in target]),
        "sinks": torch.tensor(method.sinks),
        "weights": torch.zeros(0),
        "scored": torch.tensor(1.0),
    }
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
    for part in ("key", "value"):
        if dtype in kinds:
            feed[f"{part}_cache"], feed[f"{part}_scale"] = narrowed(feed[f"{part}_cache"], kinds[dtype])
    binding = session.io_binding()
    for value in session.get_inputs():
        tensor = feed[value.name].contiguous()
        array = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        kind = onnx.TensorProto.BFLOAT16 if tensor.dtype == torch.bfloat16 else 0
        made = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind) if kind else None
        binding.bind_ortvalue_input(value.name, made or onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for value in session.get_outputs():
        binding.bind_output(value.name)
    session.run_with_iobinding(binding)
    found = {}
    for value, output in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        wide = output.numpy() if "bfloat16" not in value.type else _bfloat16(output)
        found[value.name.removesuffix("_out")] = torch.from_numpy(np.array(wide))
    for part in ("key", "value"):
        found[f"{part}_cache"] = widened(found[f"{part}_cache"], found.get(f"{part}_scale"))
    return found


def _bfloat16(value: Any) -> np.ndarray:
    """ONNX Runtime gives no numpy array of the type: its bits, as the upper half of float32."""
    import ctypes

    count = int(np.prod(value.shape()))
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr())).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(value.shape())


THRESHOLDS = [0.95, 0.85, 0.7, 0.2]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(method, dtype, id=f"{name}, {dtype}")
        for name, method in NATIVE.items()
        for dtype in LOOSE
        # 16 bits are read and written by the same code for all methods.
        if "16" not in dtype or name in ("semanticache", "importance, fitted")
    ],
)
def test_it_is_the_methods_statement(native_library: Path, method: Method, dtype: CacheType) -> None:
    """Of what a cache of the type holds: the same slots, lengths and levels, and rows within the type's rounding."""
    levels = set()
    for keep in (0.75, 0.3):
        state = example(method, batch=3)
        for part in ("key_cache", "value_cache"):
            kind = {"float32": torch.float32, "int8": torch.int8}.get(dtype) or getattr(torch, dtype)
            rows, scale = narrowed(torch.from_numpy(state[part]), kind)
            state[part] = widened(rows, scale if dtype == "int8" else None).numpy()
        target = [int(keep * CAPACITY), int(keep * CAPACITY) - 5, CAPACITY]
        want = reference(method, state, THRESHOLDS, target, [method.recent_slots(slots) for slots in target])
        got = run_native(native_library, method, dtype, state, target)
        for name in ("length", "slot_position", "slot_chunk", "level", "evicted"):
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        for name in ("key_cache", "value_cache", "slot_bias"):
            bound = 1e-5 if name == "slot_bias" else LOOSE[dtype]
            # What a dead slot holds is free.
            live = want["slot_bias"] > -np.inf if name != "slot_bias" else np.ones(want[name].shape, bool)
            ours, theirs = got[name].numpy()[live], want[name][live]
            if method.fitted_queries and name != "key_cache":
                # Solved for in steps, which carry rounding along; what is solved for is how often a slot counts.
                bound = max(bound, 2e-3)
                ours, theirs = (np.exp(each) if name == "slot_bias" else each for each in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, atol=bound, rtol=bound, err_msg=name)
        levels |= set(want["level"].tolist())
    assert set(STATE) < set(got) and -1 in levels and len(levels) > 1


def test_caches_are_read_as_they_lie() -> None:
    """No copy of a cache in float32: that, and its way back, took longer than merging."""
    graph = native_graph(SemantiCache(), "int8").graph
    assert {"SemanticCluster_unrotated_int8", "CompactCache_int8"} < {node.op_type for node in graph.node}
    readers = [node.op_type for node in graph.node if {"key_cache", "value_cache"} & set(node.input)]
    assert sorted(set(readers)) == ["SemanticCluster_unrotated_int8", "Shape"]


def test_threads_change_nothing(native_library: Path) -> None:
    method = SemantiCache(cluster_by="head")
    state, target = example(method, batch=3), [60, 50, 40]
    one, two = (run_native(native_library, method, "int8", state, target, threads) for threads in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)

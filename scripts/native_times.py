"""Times NexusAttention of libsemkv_onnxruntime.so beside GroupQueryAttention and this machine's copy bandwidth.

python scripts/native_times.py LIBRARY [--slots 2048 8192] [--rows 1] [--heads 9 3] [--head-size 64] [--layers 30]

Each subject is one graph of that many layers, each with caches of its own, so that a step reads them all from memory.
Subjects are measured in turn, and the copy with them: what disturbs the machine hits all alike. Medians; GB/s are the
live bytes of keys, values and scales read by a step; for a copy, bytes read and bytes written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

CACHE_LINE = 64

TYPES = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, np.int16),
    "int8": (TensorProto.INT8, np.int8),
}


def placed(array: np.ndarray[Any, Any], offset: int) -> np.ndarray[Any, Any]:
    """The array, `offset` bytes behind the begin of a cache line."""
    memory = np.zeros(array.nbytes + 2 * CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE + offset
    moved = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[:] = array
    return moved


class Subject:
    """A graph of attention layers in place, bound to buffers of its own."""

    def __init__(self, args: argparse.Namespace, slots: int, kind: str) -> None:
        self.kind, heads, kv_heads, size = kind, *args.heads, args.head_size
        threads = len(os.sched_getaffinity(0))
        capacity, rows = slots + args.rows, args.rows
        gqa = kind.startswith("gqa")
        cache_type, element = TYPES["float32" if gqa else kind.split()[0]]
        self.bytes = args.layers * 2 * kv_heads * slots * size * np.dtype(element).itemsize
        inputs: dict[str, tuple[int, Any]] = {}
        nodes, outputs = [], {}
        rng = np.random.default_rng(0)

        numbers = rng.standard_normal(1 << 20, dtype=np.float32)

        def tensor(*shape: int) -> np.ndarray[Any, Any]:
            return np.resize(numbers, shape)

        if gqa:
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
                inputs[name] = (TensorProto.FLOAT, tensor(1, rows, count * size))
            inputs["seqlens"] = (TensorProto.INT32, np.array([slots + rows - 1], np.int32))
            inputs["total"] = (TensorProto.INT32, np.array(slots + rows, np.int32))
            if "bias" in kind:
                inputs["bias"] = (TensorProto.FLOAT, np.zeros((1, 1, rows, capacity), np.float32))
        else:
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
                inputs[name] = (TensorProto.FLOAT, tensor(1, count, rows, size))
            inputs["bias"] = (TensorProto.FLOAT, np.zeros((1, kv_heads, capacity), np.float32))
            inputs["length"] = (TensorProto.INT64, np.array([slots], np.int64))
            if "indexed" in kind:
                named = np.sort(rng.permuted(np.tile(np.arange(slots), (1, kv_heads, 1)), axis=2)[..., : slots // 5])
                inputs["index"] = (TensorProto.INT64, np.ascontiguousarray(named))
        for layer in range(args.layers):
            caches = []
            for which in ("key", "value"):
                values = tensor(1, kv_heads, capacity, size)
                if element is np.int16:  # the upper half of a float32
                    values = values.view(np.int16)[..., 1::2].copy()
                else:
                    values = (values * 30 if element is np.int8 else values).astype(element)
                inputs[f"{which}.{layer}"] = (cache_type, placed(values, args.offset))
                outputs[f"{which}_out.{layer}"] = inputs[f"{which}.{layer}"]
                caches.append(f"{which}.{layer}")
            outputs[f"output.{layer}"] = (TensorProto.FLOAT, np.zeros_like(inputs["query"][1]))
            result = [f"output.{layer}", f"key_out.{layer}", f"value_out.{layer}"]
            if gqa:
                given = ["query", "key", "value", *caches, "seqlens", "total"]
                given += ["", "", "", "bias"] if "bias" in kind else []
                nodes.append(
                    helper.make_node(
                        "GroupQueryAttention",
                        given,
                        result,
                        domain="com.microsoft",
                        num_heads=heads,
                        kv_num_heads=kv_heads,
                    )
                )
                continue
            given, name = ["query", "key", "value", *caches, "bias", "length"], "NexusAttention"
            if "indexed" in kind:
                given.append("index")
                name += "_indexed"
            if kind.startswith("int8"):
                name += "_int8"
                self.bytes += 2 * 4 * kv_heads * slots
                for which in ("key", "value"):
                    inputs[f"{which}_scale.{layer}"] = (
                        TensorProto.FLOAT,
                        np.full((1, kv_heads, capacity), 0.03, np.float32),
                    )
                    outputs[f"{which}_scale_out.{layer}"] = inputs[f"{which}_scale.{layer}"]
                    given.append(f"{which}_scale.{layer}")
                    result.append(f"{which}_scale_out.{layer}")
            nodes.append(helper.make_node(name, given, result, domain="semkv"))
        if "indexed" in kind:
            self.bytes //= 5
        graph = helper.make_graph(
            nodes,
            "layers",
            [helper.make_tensor_value_info(name, kind, list(array.shape)) for name, (kind, array) in inputs.items()],
            [helper.make_tensor_value_info(name, kind, list(array.shape)) for name, (kind, array) in outputs.items()],
        )
        opsets = [
            helper.make_opsetid(domain, version) for domain, version in (("", 21), ("semkv", 1), ("com.microsoft", 1))
        ]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 10
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(args.library)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        values = {id(array): make(array, kind) for kind, array in (*inputs.values(), *outputs.values())}
        for name, (_, array) in inputs.items():
            self.binding.bind_ortvalue_input(name, values[id(array)])
        for name, (_, array) in outputs.items():
            self.binding.bind_ortvalue_output(name, values[id(array)])
        self.held = values, inputs, outputs

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)


def copier() -> tuple[Callable[[], None], int]:
    """A copy by all threads, and the bytes that it reads and writes."""
    threads = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(threads)
    pairs = [(np.ones(1 << 24, np.float32), np.ones(1 << 24, np.float32)) for _ in range(threads)]

    def run() -> None:
        list(pool.map(lambda pair: np.copyto(*pair), pairs))

    return run, threads * 2 * (4 << 24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="query heads, KV heads")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--offset", type=int, default=0, help="of caches, bytes behind the begin of a cache line")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kinds", nargs="+", default=["gqa", "gqa bias", "float32", "float16", "bfloat16", "int8"])
    args = parser.parse_args()
    for slots in args.slots:
        copy, copied = copier()
        subjects = [Subject(args, slots, kind) for kind in args.kinds]
        times: dict[str, list[float]] = {"copy": []} | {subject.kind: [] for subject in subjects}
        for _ in range(args.rounds):
            for kind, run in [("copy", copy), *((subject.kind, subject.run) for subject in subjects)]:
                # Until the threads of the one before have stopped spinning, and those of this one are awake.
                time.sleep(0.02)
                begin = time.perf_counter()
                while time.perf_counter() - begin < 0.03:
                    run()
                start = time.perf_counter()
                run()
                times[kind].append(time.perf_counter() - start)
        rate = copied / statistics.median(times["copy"][1:]) / 1e9
        print(f"{slots} slots, {args.rows} rows, {args.layers} layers of {args.heads} heads: copy {rate:.1f} GB/s")
        for subject in subjects:
            found = sorted(times[subject.kind][1:])
            median, speed = statistics.median(found), subject.bytes / statistics.median(found) / 1e9
            print(
                f"  {subject.kind:16} {median * 1e3:8.2f} ms ({found[0] * 1e3:.2f} to {found[-1] * 1e3:.2f})"
                f" {speed:6.1f} GB/s {speed / rate:5.0%} of the copy"
            )


if __name__ == "__main__":
    main()

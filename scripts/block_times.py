"""Times what uniform mapping is for: attention over chosen blocks, gathered at a fixed width or block by block.

python scripts/block_times.py [--library LIBRARY] [--slots 8192] [--width 1638] [--block 16] [--heads 9 3] [--layers 30]

The same blocks are chosen for all; a step of that many layers, one query row, float32. Medians of one run, in turn.

  whole        attention to every slot: what selection saves on
  fixed        blocks of one length: whole-block gathers need no table. What splitting by meaning gives up
  table        DynSplit's V2F: each block is a row of a table of fixed length, a selection is one list of fixed width,
               and one gather takes all of it; what a block lacks is masked
  loop         variable blocks without V2F: each block is sliced out, and slices are joined: a shape a block
  native       NexusAttention of libsemkv_onnxruntime.so with the table's list: nothing is gathered (with --library);
               "native together" is its time for as many slots that lie together

"overhead" is the time above that of attention to as many rows that lie together, in the same engine: NumPy but for
native. The paper (arXiv 2602.03184) says that
variable-length blocks cost 73.1 % more and that uniform mapping takes 4.9 times less of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def attend(query: Array, keys: Array, values: Array, bias: Array | float = 0.0) -> Array:
    """Attention `[Hkv,G,D]` of one row to rows `[Hkv,W,D]`."""
    logits = query @ keys.transpose(0, 2, 1) * np.float32(query.shape[-1] ** -0.5) + np.float32(bias)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.asarray(weights @ values)


class Layers:
    """Caches of several layers, blocks of their slots, and blocks that are chosen."""

    def __init__(self, args: argparse.Namespace) -> None:
        rng = np.random.default_rng(0)
        heads, kv_heads = args.heads
        size, slots = args.head_size, args.slots
        self.args, self.kv_heads = args, kv_heads
        shape = (args.layers, kv_heads, slots, size)
        numbers = rng.standard_normal(1 << 20, dtype=np.float32)
        self.keys, self.values = np.resize(numbers, shape), np.resize(numbers[::-1], shape)
        self.query = rng.standard_normal((args.layers, kv_heads, heads // kv_heads, size), dtype=np.float32)
        quarter = args.block // 4
        lengths: list[int] = []
        while sum(lengths) < slots:
            lengths.append(int(rng.integers(args.block - quarter, args.block + quarter + 1)))
        lengths[-1] -= sum(lengths) - slots
        self.length = np.array([length for length in lengths if length > 0])
        self.start = np.cumsum(self.length) - self.length
        # As many blocks as fill the width on average, other ones for each layer and head.
        self.count = args.width // args.block
        order = rng.random((args.layers, kv_heads, len(self.length))).argsort(-1)[..., : self.count]
        self.chosen = np.sort(order, -1)
        self.width = self.count * args.block
        longest = args.block + quarter
        step = np.arange(longest)
        self.table = np.where(step < self.length[:, None], self.start[:, None] + step, -1)

    def whole(self, layer: int) -> Array:
        return attend(self.query[layer], self.keys[layer], self.values[layer])

    def near(self, layer: int) -> Array:
        """Rows that lie together: what no gather can beat."""
        return attend(self.query[layer], self.keys[layer, :, : self.width], self.values[layer, :, : self.width])

    def fixed(self, layer: int) -> Array:
        """Blocks of one length: the cache is viewed as blocks, and these are gathered whole."""
        args, chosen = self.args, self.chosen[layer] % (self.args.slots // self.args.block)
        count = args.slots // args.block
        rows = []
        for cache in (self.keys, self.values):
            blocks = cache[layer, :, : count * args.block].reshape(self.kv_heads, count, args.block * args.head_size)
            taken = [blocks[head].take(chosen[head], 0) for head in range(self.kv_heads)]
            rows.append(np.stack(taken).reshape(self.kv_heads, -1, args.head_size))
        return attend(self.query[layer], *rows)

    def slots(self, layer: int) -> Array:
        """`[Hkv,count x longest]`: the selection as a list of fixed width, -1 where a block is shorter."""
        return self.table[self.chosen[layer]].reshape(self.kv_heads, -1)

    def table_gather(self, layer: int) -> Array:
        listed = self.slots(layer)
        bias = np.where(listed < 0, np.float32(-1e30), np.float32(0))[:, None]
        named = np.maximum(listed, 0)
        keys, values = (
            np.stack([cache[layer, head].take(named[head], 0) for head in range(self.kv_heads)])
            for cache in (self.keys, self.values)
        )
        return attend(self.query[layer], keys, values, bias)

    def loop(self, layer: int) -> Array:
        """A slice a block and one call a head: widths differ, so that heads cannot go together."""
        results = []
        for head, chosen in enumerate(self.chosen[layer]):
            spans = [slice(self.start[n], self.start[n] + self.length[n]) for n in chosen]
            rows = [np.concatenate([cache[layer, head, span] for span in spans]) for cache in (self.keys, self.values)]
            results.append(attend(self.query[layer, head : head + 1], rows[0][None], rows[1][None]))
        return np.concatenate(results)


def native(layers: Layers, library: str, slots: Callable[[int], Array]) -> Callable[[int], Array]:
    """NexusAttention with a list of slots for each layer, one session for all."""
    import onnxruntime
    from onnx import TensorProto, helper

    args = layers.args
    heads, kv_heads = args.heads
    names = ["query", "key", "value", "key_cache", "value_cache", "slot_bias", "length", "slot_index"]
    kinds = [TensorProto.FLOAT] * 6 + [TensorProto.INT64] * 2
    node = helper.make_node("NexusAttention_indexed", names, ["output", "key_out", "value_out"], domain="semkv")
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, kinds, strict=True)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in (("", 21), ("semkv", 1))])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bindings = []
    row = np.zeros((1, kv_heads, 1, args.head_size), np.float32)
    for layer in range(args.layers):
        caches = [np.ascontiguousarray(cache[layer][None]) for cache in (layers.keys, layers.values)]
        query = layers.query[layer].reshape(1, heads, 1, args.head_size)
        bias = np.zeros((1, kv_heads, args.slots), np.float32)
        index = slots(layer)[None].copy()
        index[index >= args.slots - 1] = -1  # the last slot is appended to
        given = [query, row, row, *caches, bias, np.array([args.slots - 1]), index]
        held = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(each)) for each in given]
        binding = session.io_binding()
        for name, value in zip(names, held, strict=True):
            binding.bind_ortvalue_input(name, value)
        result = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(query))
        for name, value in zip(node.output, (result, held[3], held[4]), strict=True):
            binding.bind_ortvalue_output(name, value)
        bindings.append((binding, held, result))

    def run(layer: int) -> Array:
        session.run_with_iobinding(bindings[layer][0])
        return np.asarray(bindings[layer][2].numpy())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library")
    parser.add_argument("--slots", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1638, help="slots that are chosen")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="query heads, KV heads")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layers = Layers(args)
    runs: dict[str, Callable[[int], Array]] = {
        "whole": layers.whole,
        "together": layers.near,
        "fixed": layers.fixed,
        "table": layers.table_gather,
        "loop": layers.loop,
    }
    if args.library:
        near = np.broadcast_to(np.arange(layers.width), (layers.kv_heads, layers.width))
        runs["native together"] = native(layers, args.library, lambda layer: near)
        runs["native"] = native(layers, args.library, layers.slots)
    # The same selection gives the same.
    np.testing.assert_allclose(runs["table"](0), runs["loop"](0), atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for layer in range(args.layers):
                run(layer)
            times[name].append((time.perf_counter() - start) * 1e3)
    median = {name: statistics.median(found) for name, found in times.items()}
    overhead = {name: median[name] - median["together"] for name in ("fixed", "table", "loop")}
    if args.library:
        overhead["native"] = median["native"] - median["native together"]
    result = {
        "ms": {name: round(value, 2) for name, value in median.items()},
        "variable_over_fixed": round(median["loop"] / median["fixed"] - 1, 3),
        "overhead_loop_over": {
            name: round(overhead["loop"] / more, 2)
            for name, more in overhead.items()
            if name in ("table", "native") and more > 0
        },
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.layers} layers, {layers.width} of {args.slots} slots in {layers.count} blocks, ms a step")
    for name, value in median.items():
        more = f"  overhead {overhead[name]:.2f}" if name in overhead else ""
        print(f"  {name:16} {value:8.2f}{more}")
    print(f"  variable blocks cost {result['variable_over_fixed']:.1%} more than fixed ones")
    print(f"  overhead of the loop / with uniform mapping: {result['overhead_loop_over']}")


if __name__ == "__main__":
    main()

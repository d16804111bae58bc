"""Times decode steps and a prompt of bundles that differ in how they were built: `step_times.py BUNDLE BUNDLE@0.2 …`.

All are opened at budget 1, or at the budget behind an @ (at as many slots as it has, then), and run in turn in one
process: what disturbs the machine hits all alike. Bundles that choose blocks have blocks of one length. Caches are
filled with numbers, not with a text, and only the decoder runs: what is timed is a step at a length, the choice of
blocks in it. Medians, with the least; how many times as fast as the first bundle; and the MiB of cache that are read.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from semkv_deploy import open_bundle, open_session
from semkv_deploy.methods import DynSplit, DynSplitSelect
from semkv_deploy.methods.behaviours import BlockTables, SlotTables
from semkv_deploy.methods.layout import DECODE
from semkv_deploy.sizes import row_bytes
from semkv_deploy.targets.engine import Engine, Feeds


def opened(name: str, threads: int | None) -> Engine:
    """The engine of a bundle, at a budget, every slot holding something."""
    root, _, budget = name.partition("@")
    engine = open_session(open_bundle(Path(root)), budget=float(budget or 1), threads=threads).engine
    rng = np.random.default_rng(0)
    for buffer in engine.contract.cache.buffers:
        for group in range(len(engine.contract.cache.groups)):
            held = engine.read(buffer.name, group)
            if buffer.name in ("key", "value"):
                numbers = rng.standard_normal(held.shape[-1])
                held = np.broadcast_to(numbers * (30 if held.dtype == np.int8 else 1), held.shape)
            elif buffer.name == "representatives":
                held = rng.standard_normal(held.shape)
            elif buffer.name.endswith("_scale"):
                held = np.full(held.shape, 0.03)
            engine.write(buffer.name, group, held)
    return engine


def attended(name: str) -> int | None:
    """Slots that a bundle's steps attend to at most; None: all."""
    method = open_bundle(Path(name.partition("@")[0])).manifest.method
    return method.attend if isinstance(method, DynSplit | DynSplitSelect) else None


def block_size(tables: BlockTables | SlotTables) -> int:
    """Slots of the blocks that a cache is said to have."""
    return tables.base if isinstance(tables, BlockTables) else tables.join


def read_bytes(engine: Engine, length: int, most: int | None) -> int:
    """Of keys, values and representatives, in a step at a length that attends to so many slots at most."""
    contract = engine.contract
    rows = min(length, contract.capacity)
    heads = sum(len(group.heads) for group in contract.cache.groups)
    read = 2 * heads * min(rows, most or rows) * row_bytes(contract.dtype, contract.head_dim)
    for tables in contract.tables:
        table = next(each for each in contract.cache.buffers if each.name == "representatives")
        *_, vectors, size = table.sizes(contract.cache.groups[0], batch=1, head_dim=contract.head_dim)
        read += heads * -(-rows // block_size(tables)) * vectors * row_bytes(contract.dtype, size)
    return read


def feeds(engine: Engine, length: int, rows: int) -> Feeds:
    """Inputs of a run that appends `rows` tokens at `length`, or at the last slots where there are not as many."""
    length = min(length, engine.contract.capacity - rows)
    more = {each.name: np.zeros(each.row_sizes(1), np.int64) for each in engine.contract.cache.step_inputs}
    for tables in engine.contract.tables:
        size = block_size(tables)
        ends = np.minimum(np.arange(size, length + size, size), length)
        more[tables.input][0, ..., : len(ends)] = ends
    return {
        **more,
        "input_ids": np.full((1, rows), 100, np.int64),
        "position_ids": length + np.arange(rows)[None],
        "logits_index": np.array([[rows - 1]]),
        "length": np.full((len(engine.contract.cache.groups), 1), length, np.int64),
    }


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, three in a row once it is warm."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.02)  # until the threads of the one before have stopped spinning
            for number in range(4):
                start = time.perf_counter()
                run()
                if number:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 1638, 8000])
    parser.add_argument("--prompt", type=int, nargs=2, default=[2048, 512], help="slots before it, tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime  [default: all cores]")
    args = parser.parse_args()
    engines = {Path(name).name: opened(name, args.threads) for name in args.bundles}
    most = {Path(name).name: attended(name) for name in args.bundles}
    for length in args.slots:
        runs = {
            name: functools.partial(engine.run, DECODE, feeds(engine, length, 1)) for name, engine in engines.items()
        }
        print(f"{length} slots, ms a step")
        found = in_turn(runs, args.rounds)
        first = statistics.median(next(iter(found.values())))
        for name, times in found.items():
            middle, read = statistics.median(times), read_bytes(engines[name], length, most[name]) / 2**20
            print(f"  {name:24} {middle:8.2f} (least {min(times):.2f}) {first / middle:6.2f}x {read:8.1f} MiB read")
    length, rows = args.prompt
    prompts = {
        name: functools.partial(engine.run, DECODE, feeds(engine, length, rows), row=0)
        for name, engine in engines.items()
    }
    print(f"{rows} tokens at {length}, tokens/s")
    for name, times in in_turn(prompts, 1).items():
        print(f"  {name:24} {rows / statistics.median(times) * 1e3:8.0f}")


if __name__ == "__main__":
    main()

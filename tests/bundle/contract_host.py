"""A host of a TensorRT bundle written from bundle.json alone, as one in C++ would be: numpy, and ONNX Runtime for
TensorRT. Nothing of semkv_deploy is imported. Graphs are float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class _Graph:
    """A graph whose inputs and outputs are bound to buffers by name."""

    def __init__(self, path: Path, contract: dict[str, Any]) -> None:
        self.contract = contract
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {tensor["name"]: tensor for tensor in contract["inputs"]}

    def run(self, given: dict[str, NDArray[Any]], results: dict[str, NDArray[Any]]) -> None:
        binding, held = self.session.io_binding(), []
        for bind, arrays in ((binding.bind_ortvalue_input, given), (binding.bind_ortvalue_output, results)):
            for name, array in arrays.items():
                assert array.flags.c_contiguous
                held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
                bind(name, held[-1])
        self.session.run_with_iobinding(binding)


class Host:
    """A conversation in every row of one budget's engines."""

    def __init__(self, root: Path, target: str, budget: int = 0) -> None:
        manifest = json.loads((root / "bundle.json").read_text(encoding="utf-8"))
        built = manifest["targets"][target]["budgets"][budget]
        self.contract = contract = built["contract"]
        self.graphs = {
            graph["phase"]: _Graph(root / engine["onnx"], graph)
            for graph, engine in zip(contract["graphs"], built["engines"], strict=True)
        }
        self.batch, self.capacity = contract["batch"], contract["capacity"]
        layers, heads = contract["layers"], contract["kv_heads"]
        rows = (self.batch, heads, self.capacity)

        def buffers() -> dict[str, NDArray[Any]]:
            cache = (*rows, contract["head_dim"])
            kinds = {"key": cache, "value": cache}
            return {kind: np.full(shape, 7, np.float32) for kind, shape in kinds.items()} | {
                "bias": np.zeros(rows, np.float32)
            }

        self.layers = [buffers() for _ in range(layers)]
        self.spare = buffers()
        self.delimiters = set(json.loads((root / contract["delimiters"]).read_text(encoding="utf-8"))["token_ids"])
        compressor = contract["compressor"]
        slots = (layers, self.batch, compressor["groups"] if compressor else 1, self.capacity)
        self.slot_position, self.slot_chunk = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.compressions = 0
        self.new_conversation()

    def new_conversation(self) -> None:
        layers = len(self.layers)
        self.position, self.length = np.zeros(self.batch, np.int64), np.zeros((layers, self.batch), np.int64)
        self.chunk, self.after_delimiter = [0] * self.batch, [False] * self.batch
        for layer in self.layers:
            layer["bias"].fill(0)

    def prompt(self, row: int, ids: list[int]) -> NDArray[np.float32]:
        """`[V]` logits after the last token."""
        piece = self.contract["prefill_chunk"]
        for start in range(0, len(ids), piece):
            tokens = ids[start : start + piece]
            appended = np.zeros(self.batch, np.int64)
            appended[row] = len(tokens)
            self._make_room(appended)
            logits = self._run("prefill", np.array([tokens]), row, len(tokens) - 1)
            self._count(row, tokens)
        return logits[0, 0]

    def step(self, tokens: Ids, wanted: list[bool]) -> NDArray[np.float32]:
        """`[B,V]` logits after one token in each row; rows that are not wanted stay as they are."""
        self._make_room(np.ones(self.batch, np.int64))
        logits = self._run("decode", tokens[:, None], None, 0)
        for row, token in enumerate(tokens.tolist()):
            if wanted[row]:
                self._count(row, [token])
        return logits[:, 0]

    def end_turn(self) -> None:
        compressor = self.contract["compressor"]
        if compressor is not None and compressor["compress_at"] == "turn":
            target = np.ceil(self.contract["budget"] * self.position).astype(np.int64)
            self._compress(np.clip(target, compressor["minimum_target"], self.contract["target"]))

    def _run(self, phase: str, tokens: Ids, row: int | None, index: int) -> NDArray[np.float32]:
        graph = self.graphs.get(phase) or self.graphs["decoder"]
        rows = slice(None) if row is None else slice(row, row + 1)
        count, width = tokens.shape
        given: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "position_ids": self.position[rows, None] + np.arange(width),
            "logits_index": np.full((count, 1), index),
            "length": np.ascontiguousarray(self.length[:, rows]),
        }
        results = {"logits": np.zeros((count, 1, self.contract["vocab_size"]), np.float32)}
        for number, layer in enumerate(self.layers):
            if self.contract["slot_bias"]:
                given[f"slot_bias.{number:02d}"] = layer["bias"][rows]
            for kind in ("key", "value"):
                name = f"past_key_values.{number:02d}.{kind}"
                view = layer[kind][rows]
                shape = graph.inputs[name]["shape"]
                if shape[1] != self.contract["kv_heads"]:  # heads lie in the first axis
                    view = view.reshape(-1, *shape[1:])
                given[name] = results[graph.contract["aliases"][name]] = view
        assert set(given) == set(graph.inputs)
        graph.run(given, results)
        return results["logits"]

    def _count(self, row: int, tokens: list[int]) -> None:
        for token in tokens:
            delimiter = token in self.delimiters
            if self.after_delimiter[row] and not delimiter:
                self.chunk[row] += 1
            self.after_delimiter[row] = delimiter
            for layer, length in enumerate(self.length[:, row]):
                self.slot_position[layer, row, :, length] = self.position[row]
                self.slot_chunk[layer, row, :, length] = 2 * self.chunk[row] + delimiter
            self.length[:, row] += 1
            self.position[row] += 1

    def _make_room(self, appended: Ids) -> None:
        full = (self.length + appended > self.capacity).any(0)
        if full.any():
            assert self.contract["compressor"] is not None, "the cache is full"
            self._compress(np.where(full, self.contract["target"], self.capacity))

    def _compress(self, target: Ids) -> None:
        compressor, graph = self.contract["compressor"], self.graphs["compressor"]
        self.compressions += 1
        for number, layer in enumerate(self.layers):
            state = {
                "length": self.length[number].copy(),
                "slot_position": self.slot_position[number],
                "slot_chunk": self.slot_chunk[number],
            }
            given: dict[str, NDArray[Any]] = {
                **state,
                **{f"{kind}_cache": layer[kind] for kind in ("key", "value")},
                "slot_bias": layer["bias"],
                "target": target,
                "recent": np.floor(compressor["recent_share"] * target).astype(np.int64),
                "sinks": np.array(compressor["sinks"][number]),
                "thresholds": np.array(compressor["thresholds"][number], np.float32),
            }
            results = {f"{name}_out": np.zeros_like(array) for name, array in state.items()}
            results |= {f"{kind}_cache_out": self.spare[kind] for kind in ("key", "value")}
            results |= {"slot_bias_out": self.spare["bias"]}
            results |= {name: np.zeros(self.batch, np.int64) for name in ("level", "evicted")}
            graph.run({name: given[name] for name in graph.inputs}, results)
            self.length[number] = results["length_out"]
            self.slot_position[number], self.slot_chunk[number] = (
                results["slot_position_out"],
                results["slot_chunk_out"],
            )
            self.layers[number], self.spare = self.spare, layer
            if not self.contract["slot_bias"]:
                self.layers[number]["bias"].fill(0)

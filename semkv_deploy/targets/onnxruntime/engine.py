"""Runs a bundle's graphs in ONNX Runtime: cache buffers, in-place appends, layers compressed into spare buffers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.base import STATE
from semkv_deploy.model.config import layer_tag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.model.config import ModelFacts


COMPRESSOR_WORKERS = 2
"""Layers compressed at the same time at most; each takes one spare layer buffer."""


class Compressed(NamedTuple):
    """What compressing one layer gave: see `methods.base` for the tensors."""

    length: NDArray[np.int64]
    slot_position: NDArray[np.int64]
    slot_chunk: NDArray[np.int64]
    level: NDArray[np.int64]
    evicted: NDArray[np.int64]


@dataclass
class Layer:
    """A layer's `key` and `value` `[B,H,C,D]` and slot `bias` `[B,H,C]`."""

    key: NDArray[Any]
    value: NDArray[Any]
    bias: NDArray[np.float32]


def onnxruntime() -> Any:
    """The `onnxruntime` module.

    Raises:
        SemkvError: when it is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise SemkvError(
            "ONNX Runtime is not installed",
            where="target onnxruntime-cpu",
            fix="install it with: pip install 'semkv-deploy[cpu]'",
        ) from None
    return ort


def inference_session(path: Path, *, threads: int | None = None, provider: str = "CPUExecutionProvider") -> Any:
    """An `InferenceSession` with settings for cache graphs.

    Raises:
        SemkvError: when ONNX Runtime cannot load the graph.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    # Shapes differ from run to run, so a memory plan of the first run is only ballast.
    options.enable_mem_pattern = False
    try:
        return ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise SemkvError(
            f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0]}",
            where=path.name,
            fix="build the bundle again with this version of onnxruntime",
        ) from error


class OnnxRuntimeEngine:
    """The caches of one session, and the decoder and compressor graphs that work on them.

    Args:
        decoder: lowered or portable decoder graph.
        compressor: compressor graph of one layer; None for a method that never compresses.
        facts: of the model.
        batch, capacity: rows and slots of the cache buffers.
        groups: cluster groups G of the compressor.
        in_place: bind each cache to the decoder's input and output alike; False keeps a second set of buffers and
            is there to check that both give the same.
        threads: intra-op threads; None: all cores.
    """

    def __init__(
        self,
        decoder: Path,
        compressor: Path | None,
        *,
        facts: ModelFacts,
        batch: int,
        capacity: int,
        groups: int = 1,
        in_place: bool = True,
        threads: int | None = None,
    ) -> None:
        self.facts, self.batch, self.capacity, self.groups, self.in_place = facts, batch, capacity, groups, in_place
        self._ort = onnxruntime()
        self._decoder = inference_session(decoder, threads=threads)
        # A compressor is many small operators: layers side by side on one thread each are nearly twice as fast as one
        # layer after the other on all threads.
        self._workers = max(1, min(COMPRESSOR_WORKERS, threads or os.cpu_count() or 1))
        self._compressor = inference_session(compressor, threads=1) if compressor else None
        self._inputs = {value.name: value for value in self._decoder.get_inputs()}
        cache = self._inputs[f"past_key_values.{layer_tag(0, facts.layers)}.key"]
        # Lowered for TensorRT, heads lie in the batch axis: the same bytes in another shape.
        self._folded = cache.shape[1] == 1 != facts.kv_heads
        self._dtype = _numpy_type(cache.type)
        # np.zeros maps pages on first touch: slots never used cost no memory.
        self._layers = [self._new_layer() for _ in range(facts.layers)]
        self._spare = [self._new_layer() for _ in range(self._workers if compressor else 0)]
        self._decode: _Binding | None = None

    def _new_layer(self) -> Layer:
        shape = (self.batch, self.facts.kv_heads, self.capacity)
        rows = (*shape, self.facts.head_dim)
        return Layer(np.zeros(rows, self._dtype), np.zeros(rows, self._dtype), np.zeros(shape, np.float32))

    @property
    def layers(self) -> list[Layer]:
        """The live buffers, for inspection; `key` and `value` `[B,H,C,D]`, `bias` `[B,H,C]`."""
        return self._layers

    def cache_bytes(self) -> int:
        """Bytes of all cache buffers, spare layers and biases included."""
        buffers = [*self._layers, *self._spare]
        return sum(layer.key.nbytes + layer.value.nbytes + layer.bias.nbytes for layer in buffers)

    def reset(self) -> None:
        """Forgets every slot (what dead slots hold changes nothing, so only biases are cleared)."""
        for layer in self._layers:
            layer.bias.fill(0)

    def run(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        length: NDArray[np.int64],
        row: int | None = None,
    ) -> NDArray[np.float32]:
        """Appends `S` tokens to one row, or one token to every row, and returns the logits of the rows asked for.

        Args:
            tokens, positions: `[n,S]`; n = 1 with `row`, else the batch.
            logits_index: `[n,R]`: which of the S rows.
            length: `[layers,n]`: live slots before the append.
            row: the batch row; None: all rows.

        Returns:
            `[n,R,V]` float32; valid until the next call.
        """
        if row is None and tokens.shape[1] == 1:
            if self._decode is None:
                self._decode = _Binding(self, slice(None), 1, 1)
            return self._decode.run(tokens, positions, logits_index, length)
        rows = slice(None) if row is None else slice(row, row + 1)
        return _Binding(self, rows, tokens.shape[1], logits_index.shape[1]).run(tokens, positions, logits_index, length)

    def compress(
        self, state: Sequence[dict[str, NDArray[np.int64]]], inputs: Sequence[dict[str, Any]]
    ) -> list[Compressed]:
        """Compresses every layer into a spare buffer, which becomes the layer's, while the layer's becomes spare.

        Args:
            state: for each layer its `length`, `slot_position`, `slot_chunk`.
            inputs: for each layer `target` and what else the method's compressor takes.
        """
        self._decode = None
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._compress_layer, range(len(state)), state, inputs))

    def _compress_layer(self, layer: int, state: dict[str, NDArray[np.int64]], inputs: dict[str, Any]) -> Compressed:
        assert self._compressor is not None, "the method never compresses"
        # As many spare buffers as workers: there is always one.
        source, spare = self._layers[layer], self._spare.pop()
        feed = {"key_cache": source.key, "value_cache": source.value, "slot_bias": source.bias, **state, **inputs}
        binding = self._compressor.io_binding()
        held = []
        for value in self._compressor.get_inputs():
            held.append(self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feed[value.name])))
            binding.bind_ortvalue_input(value.name, held[-1])
        outputs = {"key_cache_out": spare.key, "value_cache_out": spare.value, "slot_bias_out": spare.bias}
        for value in self._compressor.get_outputs():
            if value.name in outputs:
                held.append(self._ort.OrtValue.ortvalue_from_numpy(outputs[value.name]))
                binding.bind_ortvalue_output(value.name, held[-1])
            else:
                binding.bind_output(value.name)
        self._compressor.run_with_iobinding(binding)
        names = [value.name for value in self._compressor.get_outputs()]
        result = dict(zip(names, binding.get_outputs(), strict=True))
        self._layers[layer] = spare
        self._spare.append(source)
        small = [f"{name}_out" for name in STATE[3:]] + ["level", "evicted"]
        return Compressed(*(result[name].numpy() for name in small))


def _numpy_type(onnxruntime_type: str) -> np.dtype[Any]:
    names = {"tensor(float)": "float32", "tensor(float16)": "float16"}
    if onnxruntime_type not in names:
        raise SemkvError(
            "ONNX Runtime's CPU kernels do not take this cache type",
            where="past_key_values.00.key",
            expected="float32 or float16",
            got=onnxruntime_type,
        )
    return np.dtype(names[onnxruntime_type])


class _Binding:
    """The decoder's inputs and outputs bound to buffers once, for runs of one shape."""

    def __init__(self, engine: OnnxRuntimeEngine, rows: slice, tokens: int, logits: int) -> None:
        ort, facts = engine._ort, engine.facts
        n = len(range(engine.batch)[rows])
        self._engine = engine
        self._binding = engine._decoder.io_binding()
        self._small = {
            "input_ids": np.zeros((n, tokens), np.int64),
            "position_ids": np.zeros((n, tokens), np.int64),
            "logits_index": np.zeros((n, logits), np.int64),
            "length": np.zeros((facts.layers, n), np.int64),
        }
        self._logits = np.zeros((n, logits, facts.vocab_size), np.float32)
        # An OrtValue over a numpy buffer shares it, and must outlive the binding.
        self._held: list[Any] = []

        def bind(name: str, array: NDArray[Any], *, output: bool = False) -> None:
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._held.append(value)
            (self._binding.bind_ortvalue_output if output else self._binding.bind_ortvalue_input)(name, value)

        for name, array in self._small.items():
            bind(name, array)
        bind("logits", self._logits, output=True)
        self._copies: list[tuple[NDArray[Any], NDArray[Any]]] = []
        for number, layer in enumerate(engine._layers):
            tag = layer_tag(number, facts.layers)
            if f"slot_bias.{tag}" in engine._inputs:
                bind(f"slot_bias.{tag}", layer.bias[rows])
            for part, buffer in (("key", layer.key[rows]), ("value", layer.value[rows])):
                if engine._folded:
                    buffer = buffer.reshape(-1, 1, *buffer.shape[2:])
                bind(f"past_key_values.{tag}.{part}", buffer)
                appended = buffer
                if not engine.in_place:
                    appended = np.zeros_like(buffer)
                    self._copies.append((buffer, appended))
                bind(f"present.{tag}.{part}", appended, output=True)

    def run(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        length: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        small = self._small
        small["input_ids"][:], small["position_ids"][:] = tokens, positions
        small["logits_index"][:], small["length"][:] = logits_index, length
        self._engine._decoder.run_with_iobinding(self._binding)
        for buffer, appended in self._copies:
            buffer[:] = appended
        return self._logits

"""What `plan` is held against, measured in a process of its own: `python worker.py '{"what": …}'` prints JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any


def session(root: str, budget: float, batch: int, tokens: int, library: str | None = None) -> dict[str, Any]:
    """Anonymous memory that a session adds to the process: weights, caches, and all that prefill, compression and
    decoding of `tokens` tokens in each row take on top.

    Args:
        library: of native operators, for a bundle that needs them.
    """
    import numpy as np

    from semkv_deploy.bench.memory import PeakMemory
    from semkv_deploy.runtime.open import open_bundle, open_session
    from semkv_deploy.targets.onnxruntime import native
    from semkv_deploy.targets.onnxruntime.engine import onnxruntime

    if library is not None:
        native.LIBRARY = Path(library)
    onnxruntime()
    bundle = open_bundle(Path(root))
    rng = np.random.default_rng(0)
    vocabulary = bundle.manifest.model.vocab_size
    # Free pages of the heap back to the kernel: the session would grow into them unseen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with PeakMemory() as peak:
        opened = open_session(bundle, budget=budget, batch=batch)
        for group in range(len(opened.length)):  # resident as in a full cache
            for buffer in ("key", "value", "slot_bias"):
                opened.engine.read(buffer, group).fill(0)
            opened.slot_position[group].fill(0)
            opened.slot_chunk[group].fill(0)
        logits = opened.prefill(rng.integers(0, vocabulary, (batch, tokens)).tolist())
        for _ in range(4):
            logits = opened.step(logits.argmax(-1))
    return {
        "peak_bytes": int(peak.mib * (1 << 20)),
        "buffer_bytes": opened.engine.cache_bytes(),
        "metadata_bytes": sum(column.nbytes for column in (*opened.slot_position, *opened.slot_chunk)),
        "compressions": opened.stats.runs,
    }


def builder(onnx: str, profiles: list[dict[str, list[list[int]]]]) -> dict[str, Any]:
    """What TensorRT-RTX's builder says of an engine's memory: weights, and activations of each profile."""
    import tensorrt_rtx_bindings as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)

    log = Log()
    make = trt.Builder(log)
    network = make.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(onnx), parser.get_error(0).desc()
    config = make.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    for shapes in profiles:
        profile = make.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    plan = make.build_serialized_network(network, config)

    def said(what: str) -> list[int]:
        return [int(found[1]) for line in log.lines if (found := re.match(rf"Total {what} Memory: (\d+) bytes", line))]

    return {"plan_bytes": plan.nbytes, "weights": said("Weights"), "activations": said("Activation")}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps({"session": session, "builder": builder}[request.pop("what")](**request)))

"""Child process of test_tensorrt_rules.py: what TensorRT-RTX makes of ONNX files, on the CPU.

Takes a JSON file of `{name: {"path": …, "profile": {input: [min, opt, max]} | None}}`, prints one JSON line
`{name: {"result": "built" | "refused" | "crashed", "why": …, "layers": [kinds], "inputs": [types]}}`. Each model is
built in a fork, because some crash the builder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as trt


class Logger(trt.ILogger):
    """Keeps errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def build(path: str, profile: dict[str, list[list[int]]] | None) -> dict[str, Any]:
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        return {"result": "refused", "why": parser.get_error(0).desc()[:300]}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            shapes.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(shapes)
    if builder.build_serialized_network(network, config) is None:
        return {"result": "refused", "why": " ".join(logger.errors)[:300]}
    layers = [str(network.get_layer(index).type).rpartition(".")[2] for index in range(network.num_layers)]
    inputs = [str(network.get_input(index).dtype).rpartition(".")[2] for index in range(network.num_inputs)]
    return {"result": "built", "why": "", "layers": layers, "inputs": inputs}


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, or that it crashed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0 or not text:
        return {"result": "crashed", "why": f"exit code {status}"}
    return json.loads(text)


def main() -> None:
    requests = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({name: forked(lambda request=request: build(**request)) for name, request in requests.items()}))


if __name__ == "__main__":
    main()

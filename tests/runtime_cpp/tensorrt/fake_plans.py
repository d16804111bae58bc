"""A bundle that was built without engines gets plans that the stand-in for TensorRT's library opens.

A plan is a header, as TensorRT writes it, and the name of its graph: the stand-in, which is
plugins/runtime/test/tensorrt/nvinfer.cpp, runs the graph in ONNX Runtime. So the tests need neither a GPU nor TensorRT,
and run for both targets and all versions.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

TAGS = {"tensorrt": b"ftrt", "tensorrt-rtx": b"vtrt"}
VERSIONS = {"tensorrt": "10.14.1.48", "tensorrt-rtx": "1.7.1.116"}


def plan_of(name: str, target: str, version: str) -> bytes:
    """The bytes of a plan: a tag, at byte 16 how many there are, at 24 the version."""
    body = name.encode()
    size = 28 + len(body)
    return struct.pack("<4s12xQ4B", TAGS[target], size, *map(int, version.split("."))) + body


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest, which lists each file as it is now."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    files = [file for file in sorted(bundle.rglob("*")) if file.is_file() and file != path]
    manifest["files"] = {
        file.relative_to(bundle).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    path.write_text(json.dumps(manifest))


def add_plans(bundle: Path, target: str, version: str = "", capabilities: tuple[int, ...] = (86,)) -> Path:
    """Writes a plan for every graph of the target, as of a version, and lists it."""
    version = version or VERSIONS[target]

    def change(manifest: dict[str, Any]) -> None:
        record = manifest["targets"][target]
        record["version"], record["compute_capabilities"] = version, list(capabilities)
        for budget in record["budgets"]:
            for program in budget["contract"]["programs"].values():
                for graph in program["graphs"]:
                    graph["plan"] = graph["onnx"].replace(".onnx", ".plan")
                    (bundle / graph["plan"]).write_bytes(plan_of(graph["name"], target, version))

    edit(bundle, change)
    return bundle

"""Asks ONNX Runtime itself whether it takes a graph: in a process of its own, without optimising or running it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from semkv_deploy.lint.onnxruntime import Finding

SECONDS = 300

_LOAD = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
import onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
options.log_severity_level = 4
options.add_session_config_entry("session.disable_prepacking", "1")
if sys.argv[3]:
    options.register_custom_ops_library(sys.argv[3])
try:
    onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
except Exception as error:
    sys.stdout.buffer.write(str(error).encode(errors="replace"))
    sys.exit(3)
"""


def load_check(path: Path, library: Path | None = None) -> Iterator[Finding]:
    """Loads the file as ONNX Runtime's CPU provider does, weights mapped and not packed; a refusal is a finding.

    Args:
        library: of native operators that the graph has; None: it has none.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        what, fix = "ONNX Runtime is not installed here, so it was not asked", "pip install onnxruntime"
        yield Finding("model", what, fix, "unverified", "load")
        return
    command = [sys.executable, "-I", "-c", _LOAD, str(path), json.dumps(sys.path), str(library or "")]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        what = f"ONNX Runtime does not load it within {SECONDS} s"
        yield Finding("model", what, "make the graph smaller", "blocked", "load")
        return
    if done.returncode == 0:
        return
    said = " ".join(done.stdout.decode(errors="replace").split())
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", said).replace(str(path), path.name)
    if not reason:
        reason = f"loading it ends the process with status {done.returncode}"
    yield Finding("model", f"ONNX Runtime refuses it: {reason[:400]}", "export it again", "blocked", "load")

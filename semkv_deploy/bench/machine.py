"""What a time depends on beside the code: processor, memory, instruction sets, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_PACKAGES = ("semkv-deploy", "onnxruntime", "onnxruntime-genai", "xllamacpp", "transformers", "torch")

_CPUINFO = Path("/proc/cpuinfo")

_SIMD = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
"""Flags of processors that kernels of these runtimes are compiled for."""


def machine_facts() -> dict[str, Any]:
    """cpu (model), usable_cores (that this process may use) and cores, simd (flags of the processor), native_operators
    (the instruction set that ours run on here, or why there are none), memory_bytes, load (mean number of processes
    that wanted a processor in the last minute, before anything was measured), system, python, versions."""
    import psutil

    from semkv_deploy.targets.onnxruntime import native
    from semkv_deploy.targets.onnxruntime.threads import usable_cpus

    lacking = native.missing()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "usable_cores": usable_cpus(),
        "cores": os.cpu_count(),
        "simd": [flag for flag in _SIMD if flag in (_cpuinfo("flags") or _cpuinfo("Features")).split()],
        "native_operators": lacking or native.simd(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo(field: str) -> str:
    """A field of the first processor; empty where there is none."""
    if not _CPUINFO.is_file():
        return ""
    for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""

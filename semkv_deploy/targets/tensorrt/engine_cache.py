"""A folder of built engines, found by everything that shapes them.

An entry is `<key>.plan` and `<key>.json`, which has the plan's SHA-256 and what was proved when it was built. The
record is written last, so that an entry without one is none. Nothing is ever evicted: delete the folder to empty it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from semkv_deploy import __version__
from semkv_deploy.bundle import sha256
from semkv_deploy.targets.tensorrt.api import find_gpu
from semkv_deploy.targets.tensorrt.request import EngineRequest, EngineResult
from semkv_deploy.targets.tensorrt.trusted_folder import is_own_file

_CODE = ("worker.py", "proof.py", "engine_cache.py")
"""What tells the builder more than the request does, what proves, and what writes records: an edit makes every entry a
miss."""


def key_parts(request: EngineRequest, version: str, external: list[Path]) -> dict[str, object]:
    """What an engine depends on, by name.

    Args:
        version: of the runtime.
        external: files of weights that the graph refers to.
    """
    gpu, _ = find_gpu()
    library = request.plugin_library
    return {
        "tool": [__version__, *(_sha256(Path(__file__).with_name(name)) for name in _CODE)],
        "runtime": request.runtime,
        "version": version,
        "gpu": gpu if request.runtime == "tensorrt" else None,
        "graph": _sha256(request.onnx),
        "external data": {path.name: _sha256(path) for path in external},
        "profiles": request.profiles,
        "compute capabilities": request.compute_capabilities,
        "aliases": request.aliases,
        "promised": request.promised,
        "plugins": request.plugins,
        "plugin library": None if library is None else _sha256(library),
        "embed plugins": request.embed_plugins,
        "memory limit": request.memory_limit,
    }


def cache_key(parts: dict[str, object]) -> str:
    """Hexadecimal SHA-256 of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def look_up(folder: Path, key: str, plan: Path) -> EngineResult | None:
    """Copies the entry's plan to `plan`; None when there is no entry, it is not the user's own, or its plan is
    not what was stored."""
    stored, record = folder / f"{key}.plan", folder / f"{key}.json"
    # An entry may be older than the rule that the folder is the user's own.
    if not (is_own_file(stored) and is_own_file(record)):
        return None
    try:
        entry = json.loads(record.read_text(encoding="utf-8"))
        result = EngineResult.model_validate(entry["result"])
        shutil.copyfile(stored, plan)
        whole = sha256(plan) == entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        whole = False
    if not whole:
        plan.unlink(missing_ok=True)
        return None
    return result.model_copy(update={"from_cache": True})


def store(folder: Path, key: str, plan: Path, result: EngineResult) -> None:
    """Keeps a plan and its result.

    Raises:
        OSError: when the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entry = json.dumps({"sha256": sha256(plan), "result": result.model_dump(mode="json")}, indent=1)
    for name, source in ((f"{key}.plan", plan), (f"{key}.json", None)):
        handle, partial = tempfile.mkstemp(prefix=f".{name}.", suffix=".partial", dir=folder)
        os.close(handle)
        try:
            if source is None:
                Path(partial).write_text(entry + "\n", encoding="utf-8")
            else:
                shutil.copyfile(source, partial)
            os.replace(partial, folder / name)
        finally:
            Path(partial).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_once(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_once(path: Path, size: int, modified: int) -> str:
    """The weights are shared by several engines of a bundle, and are many GB."""
    return sha256(path)

"""libsemkv and its driver, built once a session in build/: later runs are quick."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.compiler.pipeline import build_bundle
from tests.tiny import with_adapter

from ..methods.matrix import FORMS

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SCRIPT = ROOT / "scripts" / "build_runtime.sh"


@contextlib.contextmanager
def built_alone() -> Iterator[None]:
    """Skips where this machine has not what libsemkv's build takes; inside, nothing else builds it.

    Tests run in several processes that share the folders: one builds, and the others find it built.
    """
    for tool in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: libsemkv is not built here")
    headers = subprocess.run([str(SCRIPT), "--print-headers"], capture_output=True, text=True)
    if headers.returncode:
        pytest.skip(f"libsemkv is not built here: {headers.stderr.strip().splitlines()[-1]}")
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "runtime.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(out: Path, *arguments: str) -> Path:
    """What scripts/build_runtime.sh makes in `out`."""
    with built_alone():
        command = ["nice", str(SCRIPT), "--jobs", "2", "--out", str(out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="session")
def driver() -> Path:
    """semkv_driver, on the library as users get it."""
    return build(BUILD / "runtime", "--driver", "--prefix", str(BUILD / "semkv")) / "semkv_driver"


@pytest.fixture(scope="session")
def installed(driver: Path) -> Path:
    """The install tree."""
    return BUILD / "semkv"


@pytest.fixture(scope="session")
def address_driver() -> Path:
    """The same under the address and undefined-behaviour sanitizers."""
    return build(BUILD / "runtime-asan", "--sanitize", "address,undefined") / "semkv_driver"


@pytest.fixture(scope="session")
def thread_driver() -> Path:
    """The same under the thread sanitizer."""
    return build(BUILD / "runtime-tsan", "--sanitize", "thread") / "semkv_driver"


@pytest.fixture(scope="session")
def bundle_of(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Bundles of a method's form, float32 weights, each built once."""
    folder, made = tmp_path_factory.mktemp("runtime_cpp"), {}

    def bundle(name: str, **options: Any) -> Path:
        key = f"{name} {sorted(options)}"
        if key not in made:
            method, out = FORMS[name], folder / str(len(made))
            defaults = {"budgets": [0.5 if method.compresses else 1.0], "weights": "fp32", "native": "off"}
            given: Any = {**defaults, **options}
            export = given.pop("export", tiny_export)
            build_bundle(
                str(export / "decoder.onnx"),
                out,
                method=with_adapter(method, export),
                target=["onnxruntime-cpu"],
                **given,
            )
            made[key] = out
        return made[key]

    return bundle

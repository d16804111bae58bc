"""Bundles for TensorRT targets with plans of the stand-in, and sessions of libsemkv on it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from tests.tiny import with_adapter

from ...methods.matrix import FORMS
from ..driver import Driver, onnxruntime_library
from .fake_plans import VERSIONS, add_plans


@pytest.fixture(scope="session")
def trt_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Bundles of a method's form and a layout of engines, budget 0.25 of 512 tokens, each built once."""
    folder, made = tmp_path_factory.mktemp("trt"), {}

    def bundle(name: str, target: str, layout: Any = "dual", batch: int = 2, dtype: Any = "float32") -> Path:
        key = (name, target, layout, batch, dtype)
        if key not in made:
            out = folder / str(len(made))
            build_bundle(
                str(tiny_export / "decoder.onnx"),
                out,
                budgets=[0.25 if FORMS[name].compresses else 1.0],
                method=with_adapter(FORMS[name], tiny_export),
                target=[target],
                tensorrt=TensorRTOptions(layout=layout, batch=batch, dtype=dtype, engines=False),
            )
            made[key] = add_plans(out, target)
        return made[key]

    return bundle


@dataclass
class Fake:
    """The stand-ins for TensorRT's and CUDA's libraries, and what they are told.

    Attributes:
        folder: where they and semkv_driver are.
        scratch: for the list of runs.
        environment: what they read when they are loaded; changed by tests.
    """

    folder: Path
    scratch: Path
    environment: dict[str, str] = field(default_factory=dict)

    def libraries(self) -> dict[str, str]:
        folder = self.folder
        return {
            "tensorrt": str(folder / "libsemkv_fake_nvinfer.so"),
            "cudart": str(folder / "libsemkv_fake_cudart.so"),
        }

    @contextlib.contextmanager
    def driver(self, bundle: Path, target: str, **environment: str) -> Iterator[Driver]:
        """A process in which the stand-in opens the bundle's plans."""
        told = {
            "SEMKV_ONNXRUNTIME": onnxruntime_library(),
            "SEMKV_FAKE_BUNDLE": str(bundle),
            "SEMKV_FAKE_TARGET": target,
            "SEMKV_FAKE_VERSION": VERSIONS[target],
            "SEMKV_FAKE_GPU": "86",
            "SEMKV_FAKE_RUNS": str(self.scratch / "runs"),
            **self.environment,
            **environment,
        }
        with Driver(self.folder / "semkv_driver", told) as cpp:
            yield cpp

    def runs(self) -> set[tuple[str, int]]:
        """(phase, profile) of the runs since the last call."""
        path = self.scratch / "runs"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return {(line.split()[0], int(line.split()[1])) for line in lines}


@pytest.fixture
def fake(driver: Path, tmp_path: Path) -> Fake:
    return Fake(driver.parent, tmp_path)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a bundle, to be spoilt."""

    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "copy"))

    return copy

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def reading_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose host reads again what was appended: 128 slots, pieces of 16 tokens."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import Importance

    out = tmp_path_factory.mktemp("reading") / "bundle"
    method = Importance(fit="none")
    decoder = tiny_export / "decoder.onnx"
    return build_bundle(decoder, out, budgets=[0.25], method=method, budget_by="uniform", weights="fp32").root


@pytest.fixture(scope="session")
def table_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose steps attend to chosen blocks, without native operators."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import DynSplitSelect

    out = tmp_path_factory.mktemp("select") / "bundle"
    build: dict[str, Any] = {"method": DynSplitSelect(attend=64), "weights": "fp32", "native": "off"}
    return build_bundle(tiny_export / "decoder.onnx", out, budgets=[0.25], **build).root


@pytest.fixture(scope="session")
def block_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose host cuts text into blocks."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import DynSplit

    out, method = tmp_path_factory.mktemp("blocks") / "bundle", DynSplit(queries="predicted")
    return build_bundle(tiny_export / "decoder.onnx", out, budgets=[0.25], method=method, weights="fp32").root


@pytest.fixture
def moved(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "moved"))


@pytest.fixture
def edit(moved: Path) -> Callable[..., None]:
    """`edit(change)`: rewrites the manifest by `change(raw)`; with `relist=True` it lists what is on disk."""

    def run(change: Callable[[dict[str, Any]], Any] = lambda raw: None, *, relist: bool = False) -> None:
        path = moved / "bundle.json"
        raw = json.loads(path.read_text())
        change(raw)
        if relist:
            files = [file for file in sorted(moved.rglob("*")) if file.is_file() and file != path]
            raw["files"] = {
                file.relative_to(moved).as_posix(): {
                    "bytes": file.stat().st_size,
                    "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                }
                for file in files
            }
        path.write_text(json.dumps(raw))

    return run


@pytest.fixture(scope="session")
def turns_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose turns become Nexus rows."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import Sonic
    from tests.tiny import with_adapter

    out = tmp_path_factory.mktemp("turns") / "bundle"
    method = with_adapter(Sonic(kept=0.2), tiny_export)
    build_bundle(
        tiny_export / "decoder.onnx", out, budgets=[0.25], method=method, weights="fp32", native="off", portable=False
    )
    return out

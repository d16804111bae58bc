"""What a build holds in memory, and for how long."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.compiler.pipeline import take_source
from semkv_deploy.export import checkpoint


def test_a_checkpoints_weights_are_gone_when_the_build_begins(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models: list[weakref.ref[Any]] = []
    load = checkpoint.load_checkpoint

    def loading(source: str) -> checkpoint.Checkpoint:
        loaded = load(source)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(checkpoint, "load_checkpoint", loading)
    take_source(str(tiny_checkpoint), tmp_path, None, lambda what, share: None)
    (model,) = models
    assert model() is None

"""A session on a bundle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from semkv_deploy.bundle import Bundle
from semkv_deploy.runtime.session import Session
from semkv_deploy.runtime.tokens import delimiter_table
from semkv_deploy.targets import require_available
from semkv_deploy.targets.onnxruntime_engine import OnnxRuntimeEngine

if TYPE_CHECKING:
    from pathlib import Path


def open_bundle(root: Path, target: str = "onnxruntime-cpu") -> Bundle:
    """Opens a bundle to run it: verifies what the target runs; `Bundle.open` verifies everything."""
    require_available(target)
    return Bundle.open(root, only=[f"targets/{target}/", "tokenizer/", "delimiters.json"])


def open_session(
    bundle: Bundle,
    *,
    budget: float | None = None,
    target: str = "onnxruntime-cpu",
    batch: int = 1,
    threads: int | None = None,
    in_place: bool = True,
) -> Session:
    """A session with empty caches.

    Args:
        budget: one that was built; None: the smallest.
        batch: rows.
        threads: intra-op threads; None: all cores.
        in_place: see `OnnxRuntimeEngine`.
    """
    manifest, profile, record = bundle.manifest, bundle.profile(budget), bundle.onnxruntime(target)
    facts, method = manifest.model, manifest.method
    engine = OnnxRuntimeEngine(
        bundle.root / record.decoder,
        bundle.root / record.compressor if record.compressor and profile.budget < 1 else None,
        facts=facts,
        batch=batch,
        capacity=profile.capacity,
        groups=method.groups(facts.kv_heads),
        in_place=in_place,
        threads=threads,
    )
    delimiters = json.loads((bundle.root / "delimiters.json").read_text(encoding="utf-8"))
    return Session(
        engine,
        windows=facts.windows,
        method=method,
        profile=profile,
        max_context=manifest.max_context,
        is_delimiter=delimiter_table(delimiters["token_ids"], facts.vocab_size),
        thresholds=profile.thresholds,
    )

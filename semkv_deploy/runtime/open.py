"""A session on a bundle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from semkv_deploy.bundle import Bundle, TargetRecord, TensorRTRecord
from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.session import Session
from semkv_deploy.runtime.tokens import delimiter_table
from semkv_deploy.targets import require_runnable

if TYPE_CHECKING:
    from pathlib import Path

    from semkv_deploy.budget_units import BudgetLike
    from semkv_deploy.bundle import BuiltProfile
    from semkv_deploy.runtime.session import Engine


def open_bundle(root: Path, target: str = "onnxruntime-cpu") -> Bundle:
    """Opens a bundle to run it: verifies what the target runs; `Bundle.open` verifies everything."""
    require_runnable(target)
    return Bundle.open(root, only=[f"targets/{target}/", "tokenizer/", "delimiters.json"])


def open_session(
    bundle: Bundle,
    *,
    budget: BudgetLike | None = None,
    target: str = "onnxruntime-cpu",
    batch: int = 1,
    threads: int | None = None,
    in_place: bool = True,
) -> Session:
    """A session with empty caches.

    Args:
        budget: one that was built, as a share, slots or bytes; None: the smallest.
        batch: rows; of a TensorRT target those that were built for.
        threads, in_place: see `OnnxRuntimeEngine`.
    """
    profile, record = bundle.profile(budget), bundle.target(target)
    engine: Engine
    if isinstance(record, TensorRTRecord):
        engine = tensorrt_engine(bundle, record, profile, batch)
    else:
        engine = _onnxruntime_engine(bundle, record, profile, batch=batch, threads=threads, in_place=in_place)
    return session_on(bundle, profile, engine)


def session_on(bundle: Bundle, profile: BuiltProfile, engine: Engine) -> Session:
    """A session of a bundle on an engine of the caller's."""
    manifest, facts = bundle.manifest, bundle.manifest.model
    delimiters = json.loads((bundle.root / "delimiters.json").read_text(encoding="utf-8"))
    return Session(
        engine,
        windows=facts.windows,
        method=manifest.method,
        profile=profile,
        max_context=manifest.max_context,
        is_delimiter=delimiter_table(delimiters["token_ids"], facts.vocab_size),
        thresholds=profile.thresholds,
    )


def _onnxruntime_engine(
    bundle: Bundle, record: TargetRecord, profile: BuiltProfile, *, batch: int, threads: int | None, in_place: bool
) -> Engine:
    from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

    facts, method = bundle.manifest.model, bundle.manifest.method
    return OnnxRuntimeEngine(
        bundle.root / record.decoder,
        bundle.root / record.compressor if record.compressor and profile.budget < 1 else None,
        facts=facts,
        batch=batch,
        capacity=profile.capacity,
        groups=method.groups(facts.kv_heads),
        in_place=in_place,
        threads=threads,
    )


def tensorrt_engine(bundle: Bundle, record: TensorRTRecord, profile: BuiltProfile, batch: int) -> Engine:
    """The engines of a budget on this machine's GPU.

    Raises:
        SemkvError: when there are none, or none for this batch, GPU or version.
    """
    from semkv_deploy.targets.tensorrt.api import find_gpu
    from semkv_deploy.targets.tensorrt.engine import TensorRTEngine

    where = f"--target {record.runtime}"
    built = next(each for each in record.budgets if each.contract.budget == profile.budget)
    plans = {each.phase: bundle.root / each.plan for each in built.engines if each.plan is not None}
    if len(plans) < len(built.engines):
        raise SemkvError("no engines were built", where=where, fix="build the bundle without --no-engines")
    if batch != built.contract.batch:
        raise SemkvError(
            "the engines take another batch",
            where=where,
            expected=f"{built.contract.batch} rows",
            got=batch,
            fix=f"build the bundle with --batch {batch}",
        )
    gpu, _ = find_gpu()
    if gpu is not None and gpu.compute_capability not in record.compute_capabilities:
        raise SemkvError(
            "the engines are for other GPUs",
            where=where,
            expected=" or ".join(f"SM{each}" for each in record.compute_capabilities),
            got=f"SM{gpu.compute_capability} ({gpu.name})",
            fix=f"build the bundle with --compute-capability {gpu.compute_capability}",
        )
    manifest = bundle.manifest
    groups = manifest.method.groups(manifest.model.kv_heads)
    return TensorRTEngine(record.runtime, plans, built.contract, groups=groups, plugins=record.plugins)

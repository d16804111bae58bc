"""Prints what a bundle holds, and checks that its engines can be opened here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from semkv_deploy.bundle import TargetRecord, TensorRTRecord
from semkv_deploy.cli.console import number_table

if TYPE_CHECKING:
    from semkv_deploy.bundle import Bundle

MIB = 1 << 20

PROVED = {
    "KV_CACHE_UPDATE": "append",
    "ATTENTION_INPUT": "fused",
    "MATRIX_MULTIPLY": "unfused",
    "PLUGIN_V3": "plugin",
}
"""Table labels for kinds of layers: appends in place, attention fused or not, plugins."""

WARNINGS = 3
"""Most warnings of the builder that are shown for an engine."""


def summary(bundle: Bundle) -> None:
    """Prints the model, the method and a row for each budget."""
    manifest = bundle.manifest
    facts, method = manifest.model, manifest.method
    console = Console()
    console.print(f"[bold]{bundle.root}[/bold]: {facts.source}, {facts.family}, {facts.layers} layers, ", end="")
    console.print(f"{facts.query_heads} heads over {facts.kv_heads} KV heads of {facts.head_dim}")
    settings = ", ".join(
        f"{name} {value}" for name, value in method.model_dump(exclude={"kind", "compress_at"}).items()
    )
    console.print(f"{method.kind}: {settings}")
    console.print(f"compress at {method.compress_at}, max context {manifest.max_context} tokens")
    for name, record in manifest.targets.items():
        if isinstance(record, TensorRTRecord):
            _tensorrt(console, name, record)
            continue
        cost = "" if record.weight_kl is None else f", KL {record.weight_kl:.4f} against fp32 on the calibration text"
        console.print(f"{name}: {record.weights} weights, {record.weight_bytes / MIB:.0f} MiB{cost}")
        console.print(f"{name}: {len(record.aliases)} caches appended in place")
        for finding in record.lint:
            console.print(f"{name}: {finding}")
    columns = ["budget", "slots", "kept when full"]
    if any(isinstance(record, TargetRecord) for record in manifest.targets.values()):
        columns.append("cache MiB per row")
    table = number_table(*columns, left=("budget",))
    for profile in manifest.profiles:
        kept = str(profile.target) if profile.budget < 1 and method.kind != "full" else "-"
        row = (profile.label, str(profile.capacity), kept, f"{profile.cache_bytes / MIB:.1f}")
        table.add_row(*row[: len(columns)])
    console.print(table)


def check_engines(bundle: Bundle) -> None:
    """Fails where a TensorRT runtime is installed that cannot open the bundle's engines.

    Raises:
        SemkvError: naming the engine and the version to install.
    """
    from semkv_deploy.targets.tensorrt.api import installed_version
    from semkv_deploy.targets.tensorrt.plan_file import check_plan

    for record in bundle.manifest.targets.values():
        if isinstance(record, TensorRTRecord) and installed_version(record.runtime) is not None:
            for budget in record.budgets:
                for engine in budget.engines:
                    if engine.plan is not None:
                        check_plan(bundle.root / engine.plan, record.runtime)


def _tensorrt(console: Console, name: str, record: TensorRTRecord) -> None:
    """Prints what a TensorRT target was built from, and a row for each engine."""
    built = f"{name} {record.version}" if record.version else f"{name}, graphs only"
    console.print(
        f"{built}: {record.dtype}, {record.layout} layout, plugins {', '.join(record.plugins) or 'none'}", end=""
    )
    if record.compute_capabilities:
        console.print(f", for compute capability {', '.join(map(str, record.compute_capabilities))}", end="")
    console.print()
    engines = [engine for budget in record.budgets for engine in budget.engines]
    # Without an engine there was no network to look layers up in.
    layers = "proved" if all(engine.plan for engine in engines) else "promised"
    table = number_table("budget", "engine", "slots", "cache MiB", "engine MiB", layers, left=("engine", layers))
    for budget in record.budgets:
        contract = budget.contract
        for engine in budget.engines:
            kinds = " + ".join(f"{count} {PROVED[kind]}" for kind, count in engine.layers.items())
            cache = f"{contract.cache_bytes / MIB:.1f}" if engine.phase != "compressor" else ""
            size = f"{engine.bytes / MIB:.1f}" if engine.plan else "-"
            table.add_row(f"{contract.budget:g}", engine.phase, str(contract.capacity), cache, size, kinds or "-")
    console.print(table)
    weights = sum(engine.weight_bytes or 0 for engine in engines)
    if weights:
        stored = f"{record.weight_bytes / MIB:.1f} MiB of weights in one file that the graphs share"
        console.print(f"{name}: {stored}; {weights / MIB:.1f} MiB in the engines, each its own")
    if built_now := [engine.peak_rss for engine in engines if engine.peak_rss is not None]:
        seconds, timings = sum(engine.seconds for engine in engines), {engine.timing_cache for engine in engines}
        console.print(
            f"{name}: built in {seconds:.0f} s with {max(built_now) / 1024**3:.1f} GiB of memory at most; ", end=""
        )
        console.print(f"kernel timings {'; '.join(sorted(timings))}")
    for engine in engines:
        for warning in engine.warnings[:WARNINGS]:
            console.print(f"{engine.phase}: TensorRT warns: {' '.join(warning.split())[:200]}", markup=False)
        if len(engine.warnings) > WARNINGS:
            console.print(f"{engine.phase}: {len(engine.warnings) - WARNINGS} more warnings are in bundle.json")
    for finding in record.lint:
        console.print(f"{name}: {finding}")

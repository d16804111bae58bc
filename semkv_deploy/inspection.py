"""What a bundle holds, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from semkv_deploy.bundle import Bundle

MIB = 1 << 20


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
        cost = "" if record.weight_kl is None else f", KL {record.weight_kl:.4f} against fp32 on the calibration text"
        console.print(f"{name}: {record.weights} weights, {record.weight_bytes / MIB:.0f} MiB{cost}")
        console.print(f"{name}: {len(record.aliases)} caches appended in place")
        for finding in record.lint:
            console.print(f"{name}: {finding}")
    table = Table()
    for column in ("budget", "slots", "kept when full", "cache MiB per row"):
        table.add_column(column, no_wrap=True, justify="left" if column == "budget" else "right")
    for profile in manifest.profiles:
        kept = str(profile.target) if profile.budget < 1 and method.kind != "full" else "-"
        table.add_row(profile.label, str(profile.capacity), kept, f"{profile.cache_bytes / MIB:.1f}")
    console.print(table)

"""Prints what a bundle holds, and checks that its engines can be opened here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from semkv_deploy.budget import label
from semkv_deploy.bundle import OnnxRuntimeRecord, TensorRTRecord
from semkv_deploy.cli.console import number_table
from semkv_deploy.model import names
from semkv_deploy.terminal import printable, show_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from semkv_deploy.bundle import Bundle, Manifest
    from semkv_deploy.bundle.contract import Contract

MIB = 1 << 20


class PlainConsole(Console):
    """A console that shows what a bundle's files say as it is: no markup of theirs, no control characters."""

    def print(self, *objects: Any, **options: Any) -> None:
        shown = [printable(each) if isinstance(each, str) else each for each in objects]
        super().print(*shown, **{"markup": False, **options})


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
    import onnx

    from semkv_deploy.passes.quantize import float32_bytes

    manifest = bundle.manifest
    facts, method = manifest.model, manifest.method
    console = PlainConsole()
    heads = f"{facts.query_heads} heads over {facts.kv_heads} KV heads of {facts.head_dim}"
    shown = printable(f": {facts.source}, {facts.family}, {facts.layers} layers, {heads}")
    console.print(Text.assemble((printable(str(bundle.root)), "bold"), shown))
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
        contract = record.budgets[0].contract
        lost = "" if record.cache_kl is None else f", KL {record.cache_kl:.4f} with fp32 weights"
        kind = "no native operators" if contract.native is None else f"native operators {contract.native}"
        console.print(f"{name}: {contract.dtype} caches{lost}; {kind}: {printable(record.native)}")
        if record.weights != "fp32":
            kept = float32_bytes(onnx.load_from_string(bundle.read(record.budgets[0].contract.decoders[0].onnx)))
            console.print(
                f"{name}: {kept / MIB:.1f} MiB of them in float32: scales, norms, what has no kernel of 8 bits"
            )
        aliases = [name for name in record.budgets[0].contract.decoders[0].aliases if names.is_cache_input(name)]
        console.print(f"{name}: {len(aliases)} caches appended in place")
        for finding in record.lint:
            console.print(f"{name}: {printable(finding)}")
    _budgets(console, manifest)


def _budgets(console: Console, manifest: Manifest) -> None:
    """Prints a row for each budget: its capacities, and what a compression keeps of them."""
    of_host = [record for record in manifest.targets.values() if isinstance(record, OnnxRuntimeRecord)]
    built = (of_host[0] if of_host else next(iter(manifest.targets.values()))).budgets
    columns = ["budget", "slots", "kept when full"] + (["cache MiB per row"] if of_host else [])
    table = number_table(*columns, left=("budget",))
    for contract in (each.contract for each in built):
        capacities = [group.capacity for group in contract.cache.groups]
        row = (
            label(contract.budget),
            _range(capacities),
            _range([group.keep_slots for group in contract.cache.groups]) if contract.compressors else "-",
            f"{contract.cache_bytes(1) / MIB:.1f}",
        )
        table.add_row(*row[: len(columns)])
    show_table(console, table)
    groups = built[0].contract.cache.groups
    if len(groups) != manifest.model.layers:
        console.print(f"{len(groups)} cache groups over {manifest.model.layers} layers")
    if any(len({group.capacity for group in each.contract.cache.groups}) > 1 for each in built):
        _shared(console, [each.contract for each in built])


def _shared(console: Console, contracts: Sequence[Contract]) -> None:
    """Prints the slots of every layer, of each of its heads where they differ."""
    table = number_table("layer", *(f"slots at {contract.budget:g}" for contract in contracts), left=())
    for layer in range(contracts[0].layers):
        row = []
        for contract in contracts:
            of_heads = {
                head: group.capacity for group in contract.cache.groups if group.layer == layer for head in group.heads
            }
            slots = [str(of_heads[head]) for head in sorted(of_heads)]
            row.append(slots[0] if len(set(slots)) == 1 else " ".join(slots))
        table.add_row(str(layer), *row)
    console.print(table)


def _range(counts: Sequence[int]) -> str:
    """One number, or the smallest and the largest."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


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
                for graph in budget.contract.graphs:
                    if graph.plan is not None:
                        check_plan(bundle.root / graph.plan, record.runtime)


def _tensorrt(console: Console, name: str, record: TensorRTRecord) -> None:
    """Prints what a TensorRT target was built from, and a row for each engine."""
    built = f"{name} {record.version}" if record.version else f"{name}, graphs only"
    what = f"{built}: {record.dtype}, {record.layout} layout, plugins {', '.join(record.plugins) or 'none'}"
    if record.compute_capabilities:
        what += f", for compute capability {', '.join(map(str, record.compute_capabilities))}"
    console.print(what)
    engines = [engine for budget in record.budgets for engine in budget.engines]
    # Without an engine there was no network to look layers up in.
    planned = all(graph.plan for budget in record.budgets for graph in budget.contract.graphs)
    layers = "proved" if planned else "promised"
    table = number_table("budget", "engine", "slots", "cache MiB", "engine MiB", layers, left=("engine", layers))
    for budget in record.budgets:
        contract = budget.contract
        for engine, graph in zip(budget.engines, contract.graphs, strict=True):
            kinds = " + ".join(
                f"{count} {PROVED.get(kind, escape(printable(kind)))}" for kind, count in engine.layers.items()
            )
            cache = f"{contract.cache_bytes() / MIB:.1f}" if graph.phase != "compressor" else ""
            size = f"{engine.bytes / MIB:.1f}" if graph.plan else "-"
            capacities = [contract.cache.groups[number].capacity for number in graph.groups]
            table.add_row(f"{contract.budget:g}", graph.phase, _range(capacities), cache, size, kinds or "-")
    show_table(console, table)
    weights = sum(engine.weight_bytes or 0 for engine in engines)
    if weights:
        stored = f"{record.weight_bytes / MIB:.1f} MiB of weights in one file that the graphs share"
        console.print(f"{name}: {stored}; {weights / MIB:.1f} MiB in the engines, each its own")
    if built_now := [engine.peak_rss for engine in engines if engine.peak_rss is not None]:
        seconds, timings = sum(engine.seconds for engine in engines), {engine.timing_cache for engine in engines}
        most = f"{max(built_now) / 1024**3:.1f} GiB of memory at most"
        console.print(f"{name}: built in {seconds:.0f} s with {most}; kernel timings {'; '.join(sorted(timings))}")
    for engine in engines:
        for warning in engine.warnings[:WARNINGS]:
            console.print(f"{engine.graph}: TensorRT warns: {' '.join(warning.split())[:200]}", markup=False)
        if len(engine.warnings) > WARNINGS:
            console.print(f"{engine.graph}: {len(engine.warnings) - WARNINGS} more warnings are in bundle.json")
    for finding in record.lint:
        console.print(f"{name}: {finding}")

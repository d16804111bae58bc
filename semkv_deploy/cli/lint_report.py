"""Lints an ONNX file or every graph of a bundle, and prints the findings as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import read_graph

if TYPE_CHECKING:
    from semkv_deploy.lint.onnxruntime import Finding

LINTED = ("tensorrt-rtx", "tensorrt", "onnxruntime-cpu", "onnxruntime-cuda")
"""Targets that have rules."""

ORDER = ("wrong", "blocked", "slow", "unverified")
COLOUR = {"wrong": "bold red", "blocked": "red", "slow": "yellow", "unverified": "cyan"}


class LintedGraph(NamedTuple):
    """A graph, the target whose rules were applied, and their findings."""

    path: Path
    target: str
    findings: list[Finding]


def lint_file(
    path: Path, target: str, *, plugins: Collection[str] = (), profiles: bool = False, native: int | None = None
) -> LintedGraph:
    """Lints one ONNX file; looks at its external data without loading it.

    Args:
        native: version of the native operators that it is meant to have.

    Raises:
        SemkvError: when the file is missing, not ONNX or contradicts itself, or the target has no rules.
    """
    from semkv_deploy.lint.load_check import load_check
    from semkv_deploy.lint.onnxruntime import lint_files, lint_onnxruntime
    from semkv_deploy.lint.structure import check_structure
    from semkv_deploy.lint.tensorrt.rules import lint_tensorrt
    from semkv_deploy.targets.onnxruntime.native import required_library

    if target not in LINTED:
        raise SemkvError("no lint rules for it", where=f"--target {target}", expected=" or ".join(LINTED))
    model = read_graph(path, expected="an ONNX file or a bundle", fix="give an ONNX file, or a bundle's directory")
    check_structure(model)
    if target.startswith("tensorrt"):
        return LintedGraph(path, target, lint_tensorrt(model, folder=path.parent, plugins=plugins, profiles=profiles))
    findings = lint_files(model, path.parent) + lint_onnxruntime(model, native=native is not None)
    if target == "onnxruntime-cpu" and not any(finding.fatal for finding in findings):
        findings += load_check(path, None if native is None else required_library(native))
    return LintedGraph(path, target, findings)


def lint_bundle(root: Path) -> list[LintedGraph]:
    """Lints every graph of every target of a bundle by that target's rules.

    Raises:
        SemkvError: as `Bundle.open`.
    """
    from semkv_deploy.bundle import Bundle

    linted: dict[tuple[str, str], LintedGraph] = {}
    for target, record in Bundle.open(root).manifest.targets.items():
        for built in record.budgets:
            for graph in built.contract.graphs:
                # Budgets of ONNX Runtime share their graphs.
                if (target, graph.onnx) not in linted:
                    linted[target, graph.onnx] = lint_file(
                        root / graph.onnx,
                        target,
                        plugins=record.plugin_operators,
                        profiles=bool(graph.profiles),
                        native=built.contract.native,
                    )
    return list(linted.values())


def report(path: Path, *, target: str, as_json: bool) -> bool:
    """Prints the findings of a file or bundle, and of a stranger's decoder whether `build` takes it.

    Returns:
        Whether one of them is fatal.
    """
    linted = lint_bundle(path) if path.is_dir() else [lint_file(path, target)]
    taken = {} if path.is_dir() else _import(path)
    if as_json:
        click.echo(json.dumps([{**_as_data(graph, path), **taken} for graph in linted], indent=1))
    else:
        for graph in linted:
            _table(graph, path)
        for words in taken.values():
            click.echo(
                f"build would import it: {words['pattern']}" if words["pattern"] else f"no import: {words['why']}"
            )
    return any(finding.fatal for graph in linted for finding in graph.findings)


def _import(path: Path) -> dict[str, dict[str, str | None]]:
    """By "import": the pattern by which `build` would take a file's attention, or why it would not."""
    from semkv_deploy.export.foreign import recognised
    from semkv_deploy.terminal import printable

    try:
        pattern = recognised(path)
    except SemkvError as error:
        return {"import": {"pattern": None, "why": printable(str(error))}}
    return {} if pattern is None else {"import": {"pattern": pattern, "why": None}}


def _label(graph: LintedGraph, root: Path) -> str:
    return str(graph.path.relative_to(root)) if root.is_dir() else str(graph.path)


def _as_data(graph: LintedGraph, root: Path) -> dict[str, object]:
    findings = [
        {key: getattr(finding, key) for key in ("verdict", "rule", "node", "what", "fix", "fatal")}
        for finding in graph.findings
    ]
    return {"file": _label(graph, root), "target": graph.target, "findings": findings}


def _table(graph: LintedGraph, root: Path) -> None:
    """Prints a row for each kind of finding: the same one in thirty layers is one row with a count."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from semkv_deploy.terminal import printable, show_table

    console = Console()

    def shown(text: str) -> str:
        """A stranger's text: no markup, no control characters."""
        return escape(printable(text))

    title = f"[bold]{shown(_label(graph, root))}[/bold], {graph.target}"
    if not graph.findings:
        console.print(f"{title}: nothing found")
        return
    kinds: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in graph.findings:
        kinds.setdefault((finding.verdict, finding.rule, finding.fix), []).append(finding)
    counts = [(sum(found.verdict == verdict for found in graph.findings), verdict) for verdict in ORDER]
    console.print(f"{title}: " + ", ".join(f"{count} {verdict}" for count, verdict in counts if count))
    table = Table("verdict", "node", "what", "fix")
    for (verdict, _, fix), found in sorted(kinds.items(), key=lambda kind: ORDER.index(kind[0][0])):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        colour = COLOUR[verdict]
        table.add_row(f"[{colour}]{verdict}[/{colour}]", shown(found[0].node) + more, shown(found[0].what), shown(fix))
    show_table(console, table)

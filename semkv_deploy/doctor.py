"""Which targets this machine has, and what is missing for the others."""

from __future__ import annotations

import json
import os
import platform

import click

from semkv_deploy.bundle import tool_versions
from semkv_deploy.targets import PLANNED, TARGETS


def findings() -> dict[str, object]:
    """Versions, machine and targets as plain data."""
    targets = {name: missing() for name, missing in TARGETS.items()}
    return {
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": tool_versions(),
        "targets": {name: {"available": gap is None, "missing": gap} for name, gap in targets.items()}
        | {name: {"available": False, "missing": gap} for name, gap in PLANNED.items()},
    }


def report(as_json: bool) -> None:
    """Prints the findings."""
    from rich.console import Console
    from rich.table import Table

    found = findings()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    console = Console()
    machine, versions, targets = found["machine"], found["versions"], found["targets"]
    assert isinstance(machine, dict) and isinstance(versions, dict) and isinstance(targets, dict)
    console.print(f"{machine['system']} {machine['architecture']}, {machine['cores']} cores, Python {found['python']}")
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    table = Table("target", "here", "what is missing")
    for name, state in targets.items():
        table.add_row(name, "yes" if state["available"] else "no", state["missing"] or "")
    console.print(table)

"""`doctor`: targets that this machine can build for and run, and what is missing for the others."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import get_args

import click

from semkv_deploy.choices import TensorRTTarget
from semkv_deploy.cli.options import PATH, json_option
from semkv_deploy.errors import SemkvError
from semkv_deploy.targets import TARGETS, TO_RUN
from semkv_deploy.terminal import show_table


@click.command()
@click.option("--plugin-library", type=PATH, help="Also list the TensorRT plugins that it registers.")
@json_option()
def doctor(plugin_library: Path | None, as_json: bool) -> None:
    """Says which targets this machine builds and runs.

    And what is missing for the others.

    \b
    semkv-deploy doctor
    semkv-deploy doctor --plugin-library build/plugins/libsemkv_plugins.so
    """
    report(as_json, plugin_library)


def findings(plugin_library: Path | None = None) -> dict[str, object]:
    """Returns versions, machine and targets as plain data.

    Args:
        plugin_library: library of TensorRT plugins to look into.

    Raises:
        SemkvError: when there is no such library.
    """
    from semkv_deploy.bundle import tool_versions
    from semkv_deploy.targets.onnxruntime.threads import usable_cpus
    from semkv_deploy.targets.tensorrt.api import find_gpu

    gpu, no_gpu = find_gpu()
    found: dict[str, object] = {
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": usable_cpus(),
            "gpu": gpu._asdict() if gpu else None,
            "no_gpu": no_gpu,
        },
        "python": platform.python_version(),
        "versions": tool_versions(),
        "targets": {name: _target(name) for name in TARGETS},
    }
    if plugin_library is not None:
        found["plugins"] = {"library": str(plugin_library), "targets": _creators(plugin_library)}
    return found


def _target(name: str) -> dict[str, object]:
    """Returns whether a target builds (`available`, `missing`) and runs (`runnable`, `missing_to_run`) here."""
    missing, to_run = TARGETS[name](), TO_RUN[name]()
    return {
        "available": missing is None,
        "missing": missing,
        "runnable": to_run is None,
        "missing_to_run": to_run,
        "notes": _notes(name) if missing is None else [],
    }


def _notes(name: str) -> list[str]:
    from semkv_deploy.targets.onnxruntime import native
    from semkv_deploy.targets.tensorrt.api import RTX_COMPUTE_CAPABILITIES, installed_version, rtx_library_folder

    if name == "onnxruntime-cpu":
        lacking = native.missing()
        return [f"native operators: {lacking or f'version {native.VERSION}, on {native.simd()}'}"]
    if name == "onnxruntime-cuda":
        return [f"native operators for CUDA: {native.missing_cuda() or f'version {native.CUDA_VERSION}'}"]
    if name == "tensorrt":
        return [f"TensorRT {installed_version('tensorrt')} builds for the GPU here"]
    if name != "tensorrt-rtx":
        return []
    capabilities = ", ".join(map(str, RTX_COMPUTE_CAPABILITIES))
    notes = [
        f"TensorRT-RTX {installed_version('tensorrt-rtx')} builds for compute capability {capabilities}, no GPU needed"
    ]
    if rtx_library_folder() is not None:
        notes.append("its wheel has no libtensorrt_rtx.so, which its parser loads: builds are given one")
    return notes


def _creators(library: Path) -> dict[str, object]:
    """Lists the plugin creators of a library, or why it does not load, for each TensorRT target installed here."""
    from semkv_deploy.targets.tensorrt.builder import list_creators

    if not library.is_file():
        raise SemkvError("no such file", where=f"--plugin-library {library}", fix="build it: scripts/build_plugins.sh")
    found: dict[str, object] = {}
    for target in get_args(TensorRTTarget):
        if TARGETS[target]() is None:
            try:
                found[target] = {"creators": list_creators(target, library), "error": None}
            except SemkvError as error:
                found[target] = {"creators": [], "error": str(error)}
    return found


def report(as_json: bool, plugin_library: Path | None = None) -> None:
    """Prints the findings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = findings(plugin_library)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    # Not as markup, which would take [gpu] for a style.
    console = Console(markup=False, highlight=False)
    machine, versions, targets = found["machine"], found["versions"], found["targets"]
    assert isinstance(machine, dict) and isinstance(versions, dict) and isinstance(targets, dict)
    gpu = machine["gpu"]
    where = f"{machine['system']} {machine['architecture']}, {machine['cores']} cores, Python {found['python']}"
    console.print(where, gpu["name"] if gpu else machine["no_gpu"], sep="; ")
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    table = Table("target", "builds here", "runs here", "what is missing")
    for name, state in targets.items():
        gaps = dict.fromkeys(filter(None, [state["missing"], state["missing_to_run"]]))
        table.add_row(
            name, *("yes" if state[key] else "no" for key in ("available", "runnable")), Text("; ".join(gaps))
        )
    show_table(console, table)
    for state in targets.values():
        for note in state["notes"]:
            console.print(note)
    plugins = found.get("plugins")
    if isinstance(plugins, dict):
        for target, loaded in plugins["targets"].items():
            console.print(f"{target}: {loaded['error'] or 'plugins ' + ', '.join(loaded['creators'])}")
        if not plugins["targets"]:
            console.print("no TensorRT here that could load the plugin library")

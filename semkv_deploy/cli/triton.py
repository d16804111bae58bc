"""`triton`: a bundle becomes a model repository for Triton Inference Server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from semkv_deploy.choices import TritonBackend
from semkv_deploy.cli.console import progress
from semkv_deploy.cli.options import (
    PATH,
    allow_plugins_option,
    budget_option,
    bundle_argument,
    force_option,
    serving_options,
    target_option,
)

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget
    from semkv_deploy.serve.options import ServingOptions


@click.command()
@bundle_argument
@click.option("-o", "--output", type=PATH, required=True, help="Model repository; other models in it stay.")
@click.option("--name", help="Name of the model.  [default: the bundle's directory]")
@budget_option("the smallest built")
@serving_options
@target_option()
@click.option(
    "--backend",
    type=click.Choice(get_args(TritonBackend)),
    default="python",
    show_default=True,
    help="Triton's Python backend, or libsemkv's C++ one, which needs no Python.",
)
@allow_plugins_option
@force_option
def triton(
    bundle: Path,
    output: Path,
    name: str | None,
    budget: Budget | None,
    serving: ServingOptions,
    target: str,
    backend: TritonBackend,
    allow_plugins: bool,
    force: bool,
) -> None:
    """Writes a model for Triton, with a copy of the bundle.

    With --backend python, Triton's Python has to have this package installed; with cpp, its backends folder has to have
    what scripts/build_runtime.sh --triton builds. docs/serving.md says what the model takes and gives.

    \b
    semkv-deploy triton bundle/ -o repository/ --name chat --budget 0.2 --rows 16
    """
    from semkv_deploy.serve.triton.repository import write_repository

    with progress() as report:
        model = write_repository(
            bundle,
            output,
            name or Path(os.path.abspath(bundle)).name,
            serving,
            budget=budget,
            target=target,
            allow_plugins=allow_plugins,
            backend=backend,
            force=force,
            progress=report,
        )
    more = "" if backend == "python" else " --backend-directory=FOLDER, which has semkv/libtriton_semkv.so"
    click.echo(f"{model}: run it with: tritonserver --model-repository={output}{more}")

"""`export`: a checkpoint becomes portable graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.console import progress
from semkv_deploy.cli.options import PATH, force_option, method_options, source_argument

if TYPE_CHECKING:
    from semkv_deploy.methods import AnyMethod


@click.command()
@source_argument
@click.option("-o", "--output", type=PATH, required=True, help="Directory to write.")
@force_option
@method_options
def export(source: str, output: Path, force: bool, method: AnyMethod) -> None:
    """Exports a checkpoint to portable ONNX.

    SOURCE is a Hugging Face directory, a .gguf file, or a hub id.

    \b
    semkv-deploy export ./SmolLM2-135M-Instruct -o exported/
    """
    from semkv_deploy.export import export_model

    with progress() as report:
        facts = export_model(source, output, method, force=force, progress=report)
    click.echo(f"{output}: {facts.family}, {facts.layers} layers, {facts.kv_heads} KV heads of {facts.head_dim}")

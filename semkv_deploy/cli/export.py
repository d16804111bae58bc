"""`export`: a checkpoint becomes portable graphs, a bundle a model directory of another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.console import progress
from semkv_deploy.cli.options import PATH, force_option, method_options, source_argument
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.methods import AnyMethod


GENAI = "onnxruntime-genai"


@click.command()
@source_argument
@click.option("-o", "--output", type=PATH, required=True, help="Directory to write.")
@click.option("--for", "runtime", type=click.Choice([GENAI]), help="SOURCE is a bundle: its full cache, for a runtime.")
@force_option
@method_options
@click.pass_context
def export(ctx: click.Context, source: str, output: Path, runtime: str | None, force: bool, method: AnyMethod) -> None:
    """Exports a checkpoint to portable ONNX, or a bundle to another runtime.

    SOURCE is a Hugging Face directory, a .gguf file, or a hub id; with --for a bundle that has budget 1.

    \b
    semkv-deploy export ./SmolLM2-135M-Instruct -o exported/
    semkv-deploy export bundle/ --for onnxruntime-genai -o genai/
    """
    from semkv_deploy.bundle.own import MANIFEST

    if runtime is not None:
        _for_genai(ctx, Path(source), output, force)
        return
    if (Path(source) / MANIFEST).is_file():
        fix = f"to run its full cache elsewhere give --for {GENAI}"
        raise SemkvError("a bundle is no checkpoint", where=source, expected="a checkpoint", got=MANIFEST, fix=fix)
    from semkv_deploy.export import export_model

    with progress() as report:
        facts = export_model(source, output, method, force=force, progress=report)
    click.echo(f"{output}: {facts.family}, {facts.layers} layers, {facts.kv_heads} KV heads of {facts.head_dim}")


def _for_genai(ctx: click.Context, bundle: Path, output: Path, force: bool) -> None:
    """Writes a model directory of onnxruntime-genai.

    Raises:
        SemkvError: also where an option says how a checkpoint is exported.
    """
    for name in ("method", "method_option", "compress_at"):
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise SemkvError("a bundle has its method already", where=option, fix=f"leave out {option}, or --for")
    from semkv_deploy.serve.genai.directory import write_genai

    with progress() as report:
        size = write_genai(bundle, output, force=force, progress=report)
    click.echo(f"{output}: open it with onnxruntime_genai.Model; {size:,} bytes of weights, a cache for all tokens")

"""`build`: an export or a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from semkv_deploy.choices import Target
from semkv_deploy.cli.console import progress, read_text
from semkv_deploy.cli.options import (
    PATH,
    budget_by_option,
    budgets_option,
    cache_dtype_option,
    cache_groups_option,
    force_option,
    max_context_option,
    method_options,
    native_option,
    source_argument,
    targets_option,
    tensorrt_options,
    weights_option,
)

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget
    from semkv_deploy.methods import AnyMethod
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions


def _read_recipe(ctx: click.Context, _: click.Parameter, path: Path | None) -> str | None:
    """Makes the recipe's values the command's defaults; returns the family it is for."""
    if path is None:
        return None
    from semkv_deploy.cli.recipe import FAMILY, load_recipe

    values = load_recipe(path, ctx.command)
    family = values.pop(FAMILY)
    ctx.default_map = values
    return str(family)


@click.command()
@source_argument
@click.option(
    "--recipe",
    "family",
    type=PATH,
    is_eager=True,
    callback=_read_recipe,
    help="YAML file with these options; those given here as well win.",
)
@click.option("-o", "--output", type=PATH, default=Path("bundle"), show_default=True)
@budgets_option(required=True)
@max_context_option
@cache_groups_option
@budget_by_option
@targets_option(f"Runtime to build for: {', '.join(get_args(Target))}", default=["onnxruntime-cpu"])
@weights_option
@native_option
@cache_dtype_option
@tensorrt_options
@click.option("--calibration-text", type=PATH, help="Text to calibrate on.  [default: one that ships here]")
@click.option("--calibration", type=PATH, help="Delimiters' weights from `calibrate`.  [default: calibrates itself]")
@click.option("--no-portable", is_flag=True, help="Leave out the float32 graphs, which validate needs.")
@click.option(
    "--config-from", type=PATH, help="Folder of an ONNX decoder's config.json and tokenizer.  [default: its own]"
)
@click.option("--no-import-check", is_flag=True, help="Do not compare another exporter's graph with its import.")
@force_option
@method_options
def build(
    source: str,
    family: str | None,
    output: Path,
    budgets: list[Budget],
    max_context: int | None,
    cache_groups: str | None,
    budget_by: Any,
    targets: tuple[str, ...],
    weights: Any,
    native: Any,
    cache_dtype: Any,
    tensorrt: TensorRTOptions,
    calibration_text: Path | None,
    calibration: Path | None,
    no_portable: bool,
    config_from: Path | None,
    no_import_check: bool,
    force: bool,
    method: AnyMethod,
) -> None:
    """Builds a bundle from an export or a checkpoint.

    SOURCE is decoder.onnx of an export, an ONNX decoder of onnxruntime-genai, optimum or torch.onnx, or anything that
    `export` takes.

    \b
    semkv-deploy build exported/decoder.onnx --budget 0.2 --budget 0.5 -o bundle/
    semkv-deploy build exported/decoder.onnx --budget 0.2 --target tensorrt-rtx --compute-capability 86,89 -o bundle/
    semkv-deploy build ./my-model --recipe recipes/qwen3-8b/tensorrt-rtx.yaml -o bundle/
    """
    from semkv_deploy.cli.bundle_summary import summary
    from semkv_deploy.compiler.pipeline import build_bundle

    table = None
    if calibration is not None:
        from semkv_deploy.compiler.domains import read_table

        table = read_table(calibration)
    text = None if calibration_text is None else read_text(calibration_text, "--calibration-text")
    with progress() as report:
        bundle = build_bundle(
            source,
            output,
            budgets=budgets,
            method=method,
            max_context=max_context,
            groups=cache_groups,
            budget_by=budget_by,
            target=targets,
            weights=weights,
            native=native,
            cache_dtype=cache_dtype,
            tensorrt=tensorrt,
            family=family,
            calibration_text=text,
            calibration=table,
            portable=not no_portable,
            prove_import=not no_import_check,
            config_from=config_from,
            force=force,
            progress=report,
        )
    summary(bundle)

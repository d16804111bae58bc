"""`calibrate`: what delimiters weigh, by domain, as a file that `build` takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.console import number_table, progress, read_text
from semkv_deploy.cli.options import PATH, method_options, source_argument
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.methods import AnyMethod
    from semkv_deploy.methods.dd_select import DelimiterTable

SHOWN = 6
"""Delimiters that the table shows of each domain: the heaviest."""


@click.command()
@source_argument
@click.option(
    "--text", "texts", multiple=True, metavar="DOMAIN=FILE", help="Text of a domain.  [default: four that ship here]"
)
@click.option("-o", "--output", type=PATH, default=Path("calibration.json"), show_default=True)
@method_options
def calibrate(source: str, texts: tuple[str, ...], output: Path, method: AnyMethod) -> None:
    """Weighs a model's delimiters for a method that cuts text at them.

    SOURCE is what `build` takes. A domain may have any name.

    \b
    semkv-deploy calibrate exported/decoder.onnx --method dynsplit --text prose=book.txt --text code=main.py
    semkv-deploy build exported/decoder.onnx --budget 0.2 --method dynsplit --calibration calibration.json
    """
    from semkv_deploy.compiler.pipeline import calibrate_delimiters

    given = dict(map(_text, texts))
    with progress() as report:
        table = calibrate_delimiters(source, method, given or None, progress=report)
    try:
        output.write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SemkvError(f"cannot be written: {error.strerror}", where=output, fix="give another path") from None
    _show(table)
    click.echo(f"{output}: {len(table.token_ids)} delimiters, {len(table.domains)} domains")


def _text(option: str) -> tuple[str, str]:
    name, equals, file = option.partition("=")
    if not equals or not name:
        raise SemkvError("not of the form DOMAIN=FILE", where="--text", got=option)
    return name, read_text(Path(file), f"--text {name}")


def _show(table: DelimiterTable) -> None:
    from rich.console import Console

    shown = number_table("domain", "tokens", "delimiters", "heaviest token ids (weight)", left=("domain",))
    for domain, tokens, count in zip(table.domains, table.tokens, table.candidates, strict=True):
        order = sorted(zip(domain.weights, table.token_ids, strict=False), reverse=True)[:SHOWN]
        heaviest = ", ".join(f"{token} ({weight / 1000:+.1f})" for weight, token in order)
        shown.add_row(domain.name, str(tokens), str(count), heaviest)
    Console().print(shown)

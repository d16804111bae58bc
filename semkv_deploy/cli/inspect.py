"""`inspect`: what is in a bundle, or what a target would refuse, ignore or do slowly."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from semkv_deploy.cli.options import bundle_argument, json_option, target_option
from semkv_deploy.errors import SemkvError


@click.command()
@bundle_argument
@click.option("--lint", is_flag=True, help="Say what a target would refuse, ignore or do slowly; takes any ONNX file.")
@target_option("Whose rules --lint applies to a file.", default="tensorrt-rtx")
@json_option("Print the manifest, or the findings, as JSON.")
def inspect(bundle: Path, lint: bool, target: str, as_json: bool) -> None:
    """Shows what is in a bundle, or lints a graph.

    A bundle is verified first. --lint takes a bundle or any ONNX file.

    With --lint the exit code is 1 when a finding stops a build.

    \b
    semkv-deploy inspect bundle/ --json
    semkv-deploy inspect --lint model.onnx
    """
    if lint:
        from semkv_deploy.cli.lint_report import report

        if report(bundle, target=target, as_json=as_json):
            sys.exit(1)
        return
    if bundle.is_file():
        raise SemkvError(
            "a file, not a bundle",
            where=bundle,
            expected="a directory written by `semkv-deploy build`",
            fix=f"add --lint to judge an ONNX file: semkv-deploy inspect --lint {bundle}",
        )
    if not (bundle / "bundle.json").exists() and (bundle / "decoder.onnx").is_file():
        decoder = bundle / "decoder.onnx"
        raise SemkvError(
            "an export, not a bundle",
            where=bundle,
            fix=f"build it (semkv-deploy build {decoder} --budget 0.5), or lint its graph: inspect --lint {decoder}",
        )
    from semkv_deploy.bundle import Bundle
    from semkv_deploy.cli.bundle_summary import check_engines, summary

    opened = Bundle.open(bundle)
    if as_json:
        # Escaped where it is not ASCII: a name in a manifest may hold what reorders or hides text on a terminal.
        click.echo(json.dumps(opened.manifest.model_dump(mode="json"), indent=1))
    else:
        summary(opened)
    check_engines(opened)

"""`serve`: an HTTP endpoint for a bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.options import (
    allow_plugins_option,
    budget_option,
    bundle_argument,
    serving_options,
    size_option,
    target_option,
)
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget
    from semkv_deploy.serve.options import ServingOptions

KEY_VARIABLE = "SEMKV_API_KEY"


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--name", help="Name of the model.  [default: the bundle's directory]")
@click.option("--api-key", envvar=KEY_VARIABLE, show_envvar=True, help="Key that callers have to send.")
@budget_option("the smallest built")
@size_option("--max-body", "Most bytes of a request.  [default: 4MiB]")
@serving_options
@target_option()
@allow_plugins_option
def serve(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    budget: Budget | None,
    max_body: int | None,
    serving: ServingOptions,
    target: str,
    allow_plugins: bool,
) -> None:
    """Serves a bundle over HTTP, as OpenAI's API has it.

    A call goes on with the session whose messages it extends; docs/serving.md says more.

    \b
    semkv-deploy serve bundle/ --budget 0.2 --rows 16
    SEMKV_API_KEY=... semkv-deploy serve bundle/ --host 0.0.0.0 --save-sessions sessions/
    """
    from semkv_deploy.serve.http.run import is_loopback, listen, require_http, run, url

    if api_key == "":
        raise SemkvError("the key is empty", where="--api-key", fix=f"give one, or unset {KEY_VARIABLE}")
    require_http()
    from semkv_deploy.budget import label
    from semkv_deploy.serve.http.app import Options
    from semkv_deploy.serve.open import open_scheduler
    from semkv_deploy.sizes import size

    with listen(host, port) as listener:
        scheduler = open_scheduler(
            bundle, serving, budget=budget, target=target, allow_plugins=allow_plugins, on_full="forget"
        )
        contract = scheduler.session.contract
        options = Options(
            name=name or Path(os.path.abspath(bundle)).name,
            api_key=api_key,
            max_body=max_body or Options.max_body,
        )
        address = url(listener)
        if api_key is None and not is_loopback(listener):
            click.echo(f"warning: {address} is open to everybody; give --api-key", err=True)

        def ready() -> None:
            caches = size(scheduler.session.engine.cache_bytes())
            budget_text = label(contract.budget)
            click.echo(f"{options.name}: {address}/v1 (budget {budget_text}, {serving.rows} rows, {caches} of caches)")

        run(scheduler, options, listener, ready)

"""`serve`: an HTTP endpoint for a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.options import (
    PATH,
    allow_plugins_option,
    budget_option,
    bundle_argument,
    size_option,
    target_option,
    threads_option,
)
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget

KEY_VARIABLE = "SEMKV_API_KEY"


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--name", help="Name of the model.  [default: the bundle's directory]")
@click.option("--api-key", envvar=KEY_VARIABLE, show_envvar=True, help="Key that callers have to send.")
@budget_option("the smallest built")
@click.option(
    "--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Sessions that have caches at one time."
)
@threads_option
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of a reply.  [default: the context]")
@size_option("--max-body", "Most bytes of a request.  [default: 4MiB]")
@click.option(
    "--max-waiting", type=click.IntRange(min=1), default=256, show_default=True, help="Most requests that wait."
)
@click.option(
    "--max-sessions",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Most sessions, saved ones included.",
)
@click.option(
    "--wait-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How long a request waits for a row.",
)
@click.option(
    "--idle-seconds",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    help="How long an idle session keeps its row.",
)
@click.option("--save-sessions", metavar="FOLDER", type=PATH, help="Save idle sessions there, forget none.")
@target_option()
@allow_plugins_option
def serve(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    budget: Budget | None,
    rows: int,
    threads: int | None,
    max_tokens: int | None,
    max_body: int | None,
    max_waiting: int,
    max_sessions: int,
    wait_seconds: float,
    idle_seconds: float,
    save_sessions: Path | None,
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
            bundle,
            budget=budget,
            target=target,
            rows=rows,
            threads=threads,
            allow_plugins=allow_plugins,
            on_full="forget",
            save_sessions=save_sessions,
            idle_seconds=idle_seconds,
            wait_seconds=wait_seconds,
            max_waiting=max_waiting,
            max_sessions=max_sessions,
        )
        contract = scheduler.session.contract
        options = Options(
            name=name or bundle.resolve().name,
            api_key=api_key,
            max_tokens=min(max_tokens or contract.max_context, contract.max_context),
            max_body=max_body or Options.max_body,
        )
        address = url(listener)
        if api_key is None and not is_loopback(listener):
            click.echo(f"warning: {address} is open to everybody; give --api-key", err=True)

        def ready() -> None:
            caches = size(scheduler.session.engine.cache_bytes())
            budget_text = label(contract.budget)
            click.echo(f"{options.name}: {address}/v1 (budget {budget_text}, {rows} rows, {caches} of caches)")

        run(scheduler, options, listener, ready)

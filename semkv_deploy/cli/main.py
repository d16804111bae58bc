"""The group of all commands; a command's module is imported when the command is called or its help is shown."""

from __future__ import annotations

import importlib
import io
import signal
import sys
from typing import Any

import click

from semkv_deploy import __version__
from semkv_deploy.cli.console import internal, sentence
from semkv_deploy.errors import SemkvError

COMMANDS = ("export", "build", "generate", "validate", "bench", "evaluate", "plan", "inspect", "doctor")
"""Each is the function of that name in the module of that name, beside this one."""

ALL_OR_NOTHING = ("export", "build")
"""Commands that leave nothing when they are interrupted; others may have written a report, or text."""


class _Commands(click.Group):
    """Turns an error into one sentence and exit code 1, unless --debug asks for the traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"semkv_deploy.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        # A terminated build cleans up like an interrupted one.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        debug = ctx.params.get("debug")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Not every terminal has every character, and not every file name is UTF-8.
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (SemkvError, OSError) as error:
            # A reader of standard output that is gone (`| head`) is click's to handle.
            if debug or isinstance(error, BrokenPipeError):
                raise
            click.echo(f"error: {sentence(error)}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            whole = ctx.invoked_subcommand in ALL_OR_NOTHING
            click.echo("interrupted: nothing was written" if whole else "interrupted", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as error:
            # A Rust library's panic is no Exception.
            if debug or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
                raise
            click.echo(f"error: {internal(error)}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="semkv-deploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Builds and runs decoder LLMs whose KV cache is compressed under a fixed memory budget.

    \b
    semkv-deploy build ./my-model --budget 0.2 -o bundle/
    semkv-deploy generate bundle/ --prompt "Why is the sky blue?"
    """

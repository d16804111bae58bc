"""The group of all commands; a command's module is imported when the command is called or its help is shown."""

from __future__ import annotations

import importlib
import io
import shutil
import signal
import sys
from collections.abc import Iterable
from typing import Any

import click

from semkv_deploy import __version__
from semkv_deploy.cli.console import internal, sentence
from semkv_deploy.errors import SemkvError
from semkv_deploy.terminal import one_line

COMMANDS = (
    "export",
    "train",
    "calibrate",
    "build",
    "generate",
    "validate",
    "bench",
    "evaluate",
    "plan",
    "inspect",
    "doctor",
)
"""Each is the function of that name in the module of that name, beside this one."""

ALL_OR_NOTHING = ("export", "build")
"""Commands whose output appears in one step; others may have written a report, or text."""


NARROW = 60
"""Columns of a terminal below which help has an option and what it does on lines of their own."""


class _Help(click.HelpFormatter):
    """Help for terminals of any width: click's own takes 50 columns at least, and breaks words on smaller ones."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns
        self._narrow = width is None and columns < NARROW
        super().__init__(indent_increment, columns - 1 if self._narrow else width, max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        if not self._narrow:
            super().write_dl(rows, col_max, col_spacing)
            return
        for term, text in rows:
            self.write_text(term)
            with self.indentation():
                self.write_text(text)


class _Context(click.Context):
    formatter_class = _Help


class _Commands(click.Group):
    """Turns an error into one sentence and exit code 1, unless --debug asks for the traceback."""

    context_class = _Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"semkv_deploy.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        command.context_class = _Context
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own cuts what a command does to one line.
        with formatter.section("Commands"):
            commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
            formatter.write_dl([(name, command.get_short_help_str(200)) for name, command in commands if command])

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
            click.echo(_interrupted(ctx.invoked_subcommand), err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as error:
            # A Rust library's panic is no Exception.
            if debug or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
                raise
            click.echo(f"error: {internal(error)}", err=True)
            ctx.exit(1)


def _interrupted(command: str | None) -> str:
    """What an interrupt left behind, as far as it is known."""
    if command not in ALL_OR_NOTHING:
        return "interrupted"
    # A command that has not come so far has not imported it either.
    module: Any = sys.modules.get("semkv_deploy.bundle.directory")
    if module is None or not module.written:
        return "interrupted: nothing was written"
    return f"interrupted: {one_line(str(module.written[-1]))} was already written, whole"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="semkv-deploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Builds and runs decoder LLMs whose KV cache is compressed under a fixed memory budget.

    \b
    semkv-deploy build ./my-model --budget 0.2 -o bundle/
    semkv-deploy generate bundle/ --prompt "Why is the sky blue?"
    """

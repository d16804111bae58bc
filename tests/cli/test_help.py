"""Help of every command: quick, with an example, the same words for the same option, for any terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from semkv_deploy.cli.main import COMMANDS, main

from .commands import cli


def test_help_does_not_import_torch_and_is_quick():
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "import semkv_deploy, semkv_deploy.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
        "print('SECONDS', time.perf_counter() - t)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "generate" in out and float(out.rsplit("SECONDS", 1)[1]) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str):
    out = cli(command, "--help").stdout
    assert f"semkv-deploy {command}" in out.split("Options")[0]


def test_help_of_every_command_imports_no_framework():
    """Names of methods take the methods, and those numpy; nothing takes more."""
    code = (
        "import sys, semkv_deploy.cli as c\n"
        f"for command in {COMMANDS!r}:\n"
        "    try: c.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_of_methods_come_from_their_registry(monkeypatch: pytest.MonkeyPatch):
    from semkv_deploy import methods
    from semkv_deploy.cli.build import build
    from semkv_deploy.methods.full import Full

    (option,) = [parameter for parameter in build.params if parameter.name == "method"]
    assert option.type.choices == tuple(methods.METHODS)
    assert option.default in methods.METHODS
    monkeypatch.setitem(methods.METHODS, "another", Full)
    assert option.type.convert("another", option, None) == "another"


def test_an_option_that_commands_share_is_the_same_in_all():
    """Same name, same help, default and choices, but for what a command says otherwise on purpose."""
    import click

    said: dict[str, set[tuple[object, ...]]] = {}
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option):
                fields = (option.help, str(option.default), str(getattr(option.type, "choices", option.type)))
                said.setdefault(option.opts[-1], set()).add(fields)
    own = {"--budget", "--target", "--json", "--batch", "--output", "--tokens", "--plugin-library"}
    own |= {"--method", "--context", "--seed", "--text", "--examples"}
    assert {option for option, ways in said.items() if len(ways) > 1} == own


@pytest.mark.parametrize("words", [("--help",), *((name, "--help") for name in COMMANDS)])
def test_help_fits_a_terminal_of_40_columns(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """Examples excepted, which are copied from it."""
    monkeypatch.setenv("COLUMNS", "40")
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0
    long = [line for line in result.stdout.splitlines() if len(line) > 40 and "semkv-deploy " not in line]
    assert not long
    wide = CliRunner().invoke(main, list(words), env={"COLUMNS": "100"}).stdout

    def prose(text: str) -> str:
        return "".join("".join(line.split()) for line in text.splitlines() if "semkv-deploy " not in line)

    assert prose(result.stdout) == prose(wide)

"""Reads recipes: YAML files with the options of `build` for one model and target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    import click

FAMILY = "family"
"""Beside the options of `build`: the model family (transformers' `model_type`) the recipe is made for."""

CALLERS = ("output", "force", "plugin-library", "engine-cache", "allow-plugins", "debug")
"""Options that no recipe may set: where to write, what to replace, and which native code to run is the caller's."""

_KINDS = (str, int, float)


def load_recipe(path: Path, command: click.Command) -> dict[str, Any]:
    """Reads a recipe; returns its values by the parameter names of `command`, and `family`.

    Keys are the command's options without their dashes (`max-context`), and `source`; a list is an option given
    several times, and `method-option` may be a mapping.

    Raises:
        SemkvError: when the file is missing, is no YAML mapping, lacks its family, has a key or value that the
            command does not take, or a key that is the caller's to give.
    """
    import click

    from semkv_deploy.cli.yaml_values import LONGEST, brief, parse
    from semkv_deploy.runtime.tokens import decoded_text

    if not path.is_file():
        raise SemkvError("no such file", where=f"--recipe {path}", expected="a recipe, such as those in recipes/")
    with path.open("rb") as file:
        raw = parse(decoded_text(file.read(4 * LONGEST + 1), f"--recipe {path}"), path)
    if not isinstance(raw, dict) or not isinstance(raw.get(FAMILY), str):
        raise SemkvError("not a recipe", where=path, expected="a mapping with family, source, budget, target, …")
    parameters = {_key(parameter): parameter for parameter in command.params if parameter.name != "recipe"}
    values: dict[str, Any] = {FAMILY: raw.pop(FAMILY)}
    for key, value in raw.items():
        if str(key).replace("_", "-") in CALLERS:
            raise SemkvError(
                "a recipe may not set it", where=f"{path}: {key}", fix=f"give it on the command line: --{key}"
            )
        parameter = parameters.get(str(key))
        if parameter is None or parameter.name is None:
            raise SemkvError(
                "unknown key",
                where=path,
                expected=f"family, {', '.join(sorted({*parameters} - {*CALLERS}))}",
                got=brief(key),
            )
        if isinstance(value, dict) and all(isinstance(text, _KINDS) for text in value.values()):
            value = [f"{name}={text}" for name, text in value.items()]
        several = isinstance(parameter, click.Option) and parameter.multiple
        items = value if isinstance(value, list) else [value]
        if not items or (len(items) > 1 and not several) or not all(isinstance(item, _KINDS) for item in items):
            expected = "one value or a list of them" if several else "one value"
            raise SemkvError("wrong kind of value", where=f"{path}: {key}", expected=expected, got=brief(value))
        values[parameter.name] = items if several else items[0]
    return values


def _key(parameter: click.Parameter) -> str:
    """Returns the key of a parameter in a recipe: its long option, or an argument's name."""
    long = [option for option in parameter.opts if option.startswith("--")]
    return long[0].removeprefix("--") if long else str(parameter.name)

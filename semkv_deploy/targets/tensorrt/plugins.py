"""Which operators of a bundle become TensorRT plugins, and that those asked for are in its engines."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, get_args

from semkv_deploy.choices import TensorRTTarget
from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import SPECS
from semkv_deploy.passes.plugin_nodes import NAMESPACE, VERSION
from semkv_deploy.targets.tensorrt.api import missing

DECODER_OPERATORS = ("NexusAttention", "SemanticBlockSelect")
OPERATORS = (*DECODER_OPERATORS, "SemanticCluster", "CompactCache", "SemanticBlockMap")
"""Operators of a bundle's graphs, and so what can be a plugin in them."""

_BUILD = "build it with scripts/build_plugins.sh"


class PluginChoice(NamedTuple):
    """Operators that become plugins, and whether each was asked for by its name (and so must be in an engine)."""

    operators: frozenset[str]
    by_name: bool


def choose_plugins(asked: tuple[str, ...], library: Path | None, target: TensorRTTarget) -> PluginChoice:
    """The operators that `--plugins` names; with "auto" those that the library registers.

    Where a TensorRT is installed the library is loaded, in a process of its own, so that one without the plugins is
    refused before minutes of work.

    Raises:
        SemkvError: on a name that is no operator, plugins without their library, or a library without the plugins.
    """
    names = {name.replace("_", "").lower(): name for name in OPERATORS}
    keys = [name.replace("_", "").lower() for name in asked]
    if library is not None and not library.is_file():
        raise SemkvError("no such file", where=f"--plugin-library {library}", fix=_BUILD)
    if keys == ["none"]:
        return PluginChoice(frozenset(), by_name=False)
    auto = keys == ["auto"]
    unknown = [name for name, key in zip(asked, keys, strict=True) if key not in names and not auto]
    if unknown:
        snake = [SPECS[name].torch_name for name in OPERATORS]
        raise SemkvError(
            "unknown plugin", where="--plugins", expected=f"none, auto, or of {', '.join(snake)}", got=unknown[0]
        )
    if library is None:
        raise SemkvError(
            "plugins were asked for without their library",
            where=f"--plugins {','.join(asked)}",
            expected="--plugin-library libsemkv_plugins.so",
            fix=f"{_BUILD}, or use --plugins none",
        )
    registered = _registered(library, target)
    if auto:
        if registered is None:
            raise SemkvError(
                "no TensorRT is installed here that could say what the plugin library has",
                where="--plugins auto",
                fix="name the operators, such as --plugins nexus_attention, or install TensorRT-RTX",
            )
        found = frozenset(name for name in OPERATORS if _creator(name) in registered)
        if not found:
            raise _none_registered("--plugins auto", library, OPERATORS, registered)
        return PluginChoice(found, by_name=False)
    operators = frozenset(names[key] for key in keys)
    absent = [name for name in OPERATORS if name in operators and registered is not None]
    absent = [name for name in absent if _creator(name) not in (registered or [])]
    if absent:
        raise _none_registered("--plugins", library, absent, registered or [])
    return PluginChoice(operators, by_name=True)


def check_asked_are_used(
    choice: PluginChoice, used: Collection[str], budget: float, *, compresses: bool, elsewhere: Collection[str]
) -> None:
    """Fails where an operator asked for by its name is a plugin in no engine of a budget.

    Args:
        used: operators that are plugins in this budget's engines.
        compresses: whether the budget has a compressor engine; a full cache needs none of the compressor's plugins.
        elsewhere: operators that are plugins in engines of the other budgets.

    Raises:
        SemkvError: naming the operator.
    """
    if not choice.by_name:
        return
    for name in sorted(choice.operators - set(used)):
        if not compresses and name not in DECODER_OPERATORS and name in elsewhere:
            continue
        raise SemkvError(
            f"{name} was asked for as a plugin and is in no engine of budget {budget:g}",
            where="--plugins",
            expected="operators that the method's graphs have",
            got=", ".join(sorted(used)) or "no plugin in any engine",
            fix="leave it out of --plugins, or choose a --method that has it",
        )


def _creator(operator: str) -> str:
    return f"{NAMESPACE}::{operator} {VERSION}"


def _registered(library: Path, target: TensorRTTarget) -> list[str] | None:
    """Creators of the library; None where there is no TensorRT that could load it. Any one will do: the API is one."""
    from semkv_deploy.targets.tensorrt.builder import list_creators

    for runtime in (target, *get_args(TensorRTTarget)):
        if missing(runtime) is None:
            return list_creators(runtime, library)
    return None


def _none_registered(where: str, library: Path, wanted: Collection[str], got: Collection[str]) -> SemkvError:
    return SemkvError(
        f"the plugin library has no {' or '.join(wanted)}",
        where=f"{where} --plugin-library {library}",
        expected=" or ".join(map(_creator, wanted)),
        got=", ".join(got) or "no plugins at all",
        fix=f"{_BUILD}, or leave it out of --plugins",
    )

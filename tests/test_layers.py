"""The rooms of the package and the arrows between them: imports point down, and no rooms import each other in a circle.

A room is a folder of `semkv_deploy`, or a file at its top. Imports inside functions count; those that only a type
checker sees do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "semkv_deploy"

FLOORS = (
    ("cli",),
    ("validate", "bench", "evaluate", "calibrate", "train"),
    ("compiler", "runtime", "memory"),
    ("targets", "export"),
    ("lint", "passes"),
    ("bundle",),
    ("methods",),
    ("budget", "model"),
    ("ops",),
    ("graph",),
    ("budget_units",),
    ("errors", "sizes", "choices", "terminal"),
)
"""From the top down. Rooms on one floor may import each other in one direction."""

EXCEPTIONS: frozenset[tuple[str, str]] = frozenset()
"""Arrows (importing room, imported room) that point up for now, each with a comment that says why."""

FILE_CIRCLES: frozenset[frozenset[str]] = frozenset()
"""Files that import each other for now."""


def modules() -> dict[str, Path]:
    """The package's modules by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: set[str]) -> set[str]:
    """Modules of the package that a source imports when it is run, at the top or inside functions."""

    def names(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are written with the package's name"
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    yield name if name in known else str(child.module)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from names(ast.Module(child.orelse, []))
            else:
                yield from names(child)

    return {name for name in names(ast.parse(source)) if name in known}


def room(module: str) -> str | None:
    """The room of a module; None for the package itself, which is everybody's."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def file_arrows() -> dict[str, set[str]]:
    found = modules()
    known = set(found)
    return {name: imported(path.read_text(encoding="utf-8"), known) - {name} for name, path in found.items()}


def room_arrows() -> dict[tuple[str, str], list[str]]:
    """Arrows between rooms, with the files that draw them."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for name, targets in file_arrows().items():
        for target in targets:
            here, there = room(name), room(target)
            if here and there and here != there:
                arrows.setdefault((here, there), []).append(f"{name} imports {target}")
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of arrows; empty when there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_one_floor():
    rooms = [room(name) for name in modules() if room(name)]
    assert sorted(set(rooms)) == sorted(name for floor in FLOORS for name in floor)


def test_no_arrow_points_up():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = {arrow: files for arrow, files in room_arrows().items() if floor[arrow[0]] > floor[arrow[1]]}
    assert {arrow: files for arrow, files in upward.items() if arrow not in EXCEPTIONS} == {}
    assert set(upward) == EXCEPTIONS, "an exception that is no longer needed goes"


def test_no_rooms_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for here, there in set(room_arrows()) - EXCEPTIONS:
        rooms.setdefault(here, set()).add(there)
    assert circle(rooms) == []


def test_no_files_import_each_other_in_a_circle():
    arrows, left = file_arrows(), set(FILE_CIRCLES)
    while found := circle(arrows):
        pair = frozenset(found)
        assert pair in left, " → ".join(found)
        left.remove(pair)
        arrows[found[0]].discard(found[1])
        arrows[found[1]].discard(found[0])
    assert left == set(), "a circle that is no longer there goes from the list"


def test_what_counts_as_an_import():
    known = {"p", "p.a", "p.b", "p.c", "p.d", "p.d.e", "p.f"}
    source = """
from __future__ import annotations
from typing import TYPE_CHECKING
import onnx
import p.a
from p import b
if TYPE_CHECKING:
    from p.c import Thing
else:
    from p.f import other
def function():
    with open("x") as file:
        from p.d.e import inside
"""
    assert imported(source, known) == {"p.a", "p.b", "p.f", "p.d.e"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle({"a": {"b", "c"}, "b": {"c"}})

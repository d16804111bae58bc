"""The tables of inputs and outputs in the plugins' READMEs, against the operators they describe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from semkv_deploy.ops import SPECS
from semkv_deploy.ops.spec import OperatorSpec, TensorSpec

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"


class Row(NamedTuple):
    kind: str
    name: str
    shape: str
    dtype: str
    options: tuple[str, ...]
    aliases: bool


def table(readme: str) -> list[Row]:
    """A row for each tensor: one line may have several, and tell of other types with some options."""
    rows = []
    for kind, names, shape, dtype, options in re.findall(
        r"^\| (in|out) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|(?: ([^|]*)\|)?$", readme, re.MULTILINE
    ):
        first = "T" if dtype.startswith("as the caches") else re.split("[ ,]", dtype)[0]
        given = tuple(re.findall(r"`(\w+)`", options))
        rows += [Row(kind, name, shape.strip(), first, given, "alias" in dtype) for name in names.strip().split(", ")]
    return rows


def expected(spec: OperatorSpec) -> list[Row]:
    """Options that bring the same tensors share a row, as int8 and fp8 do."""

    def row(kind: str, tensor: TensorSpec, options: tuple[str, ...]) -> Row:
        inputs = {t.name for t in (*spec.inputs, *(t for option in spec.options for t in option.inputs))}
        source = tensor.name.removesuffix("_out")
        aliases = kind == "out" and source in inputs and source != "length" and source != tensor.name
        return Row(kind, tensor.name, tensor.shape, tensor.dtype, options, aliases)

    rows = []
    for kind in ("in", "out"):
        tensors = dict.fromkeys(spec.inputs if kind == "in" else spec.outputs, ())
        for option in spec.options:
            for t in option.inputs if kind == "in" else option.outputs:
                tensors[t] = (*tensors.get(t, ()), option.name)
        rows += [row(kind, t, options) for t, options in tensors.items()]
    return rows


@pytest.mark.parametrize("name", sorted(SPECS))
def test_table_is_the_operators(name: str) -> None:
    readme = (PLUGINS / SPECS[name].torch_name / "README.md").read_text()
    assert table(readme) == expected(SPECS[name])
    # Attributes with their defaults: `span` (64).
    for attribute, default in SPECS[name].attributes.items():
        assert re.search(rf"`{attribute}` \({default:g}\b", readme), attribute


def test_a_wrong_table_is_noticed() -> None:
    readme = (PLUGINS / "semantic_cluster" / "README.md").read_text()
    want = expected(SPECS["SemanticCluster"])
    for right, wrong in (
        ("| in | target | B | int64 |\n", ""),
        ("B,G,L,C", "B,L,G,C"),
        ("thresholds | L | float32", "thresholds | L | T"),
        ("T, alias the caches", "T"),
        ("| out | level", "| in | level"),
    ):
        assert right in readme
        assert table(readme.replace(right, wrong)) != want

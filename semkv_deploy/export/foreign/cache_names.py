"""Names of caches are no proof of what they are; where they have a system, they must not contradict the graph.

Layers pair by how they are wired. A host pairs by name: `present.3.key` goes into `past_key_values.3.key`. A graph in
which the two disagree does at its host what the wiring alone does not show.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from semkv_deploy.export.foreign.layers import Layer

_NUMBER = re.compile(r"\d+")


def check_names(layers: Sequence[Layer]) -> None:
    """Compares the numbers, and what is called a key, in names of caches with the wiring.

    Raises:
        SemkvError: naming the first cache that a host would put elsewhere.
    """
    keys, values = ([_pattern(layer.past[place]) for layer in layers] for place in (0, 1))
    called = set(keys) | set(values)
    if len(called) == 2 and set(keys) & set(values):
        layer = next(layer for layer, pattern in zip(layers, keys, strict=True) if pattern != keys[-1])
        raise SemkvError(
            "layers disagree about what is called a key",
            where=layer.node.name,
            expected=f"keys of {keys[-1]}",
            got=layer.past[0].name,
        )
    for place in (0, 1):
        pasts, presents = [layer.past[place] for layer in layers], [layer.present[place] for layer in layers]
        if len({_pattern(value) for value in pasts}) > 1 or len({_pattern(value) for value in presents}) > 1:
            continue
        before, after = [_numbers(value) for value in pasts], [_numbers(value) for value in presents]
        if before == after or sorted(before) != sorted(after):
            continue
        crossed = next(number for number in range(len(layers)) if before[number] != after[number])
        raise SemkvError(
            "a cache comes out under another layer's name",
            where=layers[crossed].node.name,
            expected=f"{presents[after.index(before[crossed])].name}, as {pasts[crossed].name} went in",
            got=presents[crossed].name,
        )


def _pattern(value: ir.Value) -> str:
    return _NUMBER.sub("#", value.name or "")


def _numbers(value: ir.Value) -> list[str]:
    return _NUMBER.findall(value.name or "")

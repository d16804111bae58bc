"""Rotary embeddings: the frequencies behind tables, of a node or as a graph computes them at its positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.evaluate import Evaluator
from semkv_deploy.export.foreign.masks import feeds
from semkv_deploy.graph.editing import sole
from semkv_deploy.model.config import Rotary

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from semkv_deploy.export.foreign.interface import Interface

TABLE_ROWS = 512
"""Positions at which a graph's tables are computed."""


def rotary_of(cos: NDArray[Any], sin: NDArray[Any]) -> Rotary | None:
    """Frequencies behind tables `[P,D/2]`, if the tables follow from them; None: they do not."""
    if min(cos.shape) < 1 or len(cos) < 2:
        return None
    scaling = float(np.hypot(cos[0], sin[0])[0])
    frequencies = _frequencies(cos, sin)
    angles = np.arange(len(cos))[:, None] * frequencies
    # Angles were computed in float32, so that late positions are off by a part of their size.
    near = 1e-5 + 4e-7 * np.abs(angles)
    if all((table == table.astype(np.float16)).all() for table in (cos, sin)):
        near += 1e-3  # and rounded to float16, by up to 2.4e-4, as were those that frequencies are read off
    right = all(
        (np.abs(table - scaling * function(angles)) <= scaling * near).all()
        for table, function in ((cos, np.cos), (sin, np.sin))
    )
    if not right:
        return None
    return Rotary(
        inv_freq=tuple(frequencies.tolist()), attention_scaling=scaling, dim=2 * cos.shape[1], interleaved=False
    )


def _frequencies(cos: NDArray[Any], sin: NDArray[Any]) -> NDArray[Any]:
    """Angles of a position's step; the later the position that tells, the less its rounding means."""
    found = np.arctan2(sin[1], cos[1])
    last = len(cos) - 1
    for position in (*(2**power for power in range(1, last.bit_length()) if 2**power < last), last):
        off = np.arctan2(sin[position], cos[position]) - position * found
        found = found + ((off + np.pi) % (2 * np.pi) - np.pi) / position
    return np.asarray(found)


def tables_in_graph(model: ir.Model, roles: Interface, rows: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Cosines and sines `[P,D/2]` by which a graph turns the keys of all layers alike; None: it does not, or otherwise.

    Looked for: `key * cos + concat(-key[half:], key[:half]) * sin`.
    """
    found = set()
    for layer in roles.layers:
        pair = None if layer.new_key is None else _cos_and_sin(layer.new_key)
        if pair is None:
            return None
        found.add(tuple(_before_layout(value) for value in pair))
    if len(found) != 1:
        return None
    ((cos, sin),) = found
    tables = []
    for value in (cos, sin):
        try:
            whole = Evaluator(model, str(value.name))(feeds(roles, 0, rows)).astype(np.float64)
        except SemkvError:
            return None
        whole = whole.reshape(-1, whole.shape[-1])
        half = whole.shape[-1] // 2
        if len(whole) != rows or (whole[:, :half] != whole[:, half:]).any():
            return None
        tables.append(whole[:, :half])
    return tables[0], tables[1]


def _cos_and_sin(key: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    total = sole(_without_layout(key), "Add")
    products = [sole(value, "Mul") for value in total.inputs] if total else []
    if len(products) != 2 or None in products:
        return None
    cos = sin = None
    for product in products:
        assert product is not None
        first, second = product.inputs
        turned = next((value for value in (first, second) if _is_half_turned(value)), None)
        if turned is not None:
            sin = second if turned is first else first
        else:
            cos = second
    return None if cos is None or sin is None else (cos, sin)


def _is_half_turned(value: ir.Value | None) -> bool:
    joined = sole(value, "Concat")
    return joined is not None and len(joined.inputs) == 2 and sole(joined.inputs[0], "Neg") is not None


def _without_layout(value: ir.Value) -> ir.Value:
    """The value that a layer's heads were laid out of."""
    while (node := sole(value, "Reshape") or sole(value, "Transpose")) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _before_layout(value: ir.Value) -> ir.Value:
    """The value that a layer gave an axis of heads."""
    node = sole(value, "Unsqueeze")
    inner = node.inputs[0] if node else None
    return value if inner is None else inner

"""The smallest decoder: one NexusAttention, with the names a decoder has, and inputs for it."""

from __future__ import annotations

from typing import Any

import numpy as np

D = 16
"""Head size."""


def decoder(heads: int, kv_heads: int, head_dim: int = D, **attributes: Any) -> str:
    """The smallest decoder as text: one NexusAttention, with the names a decoder has."""
    cache = f"float[batch,{kv_heads},capacity,{head_dim}]"
    settings = {"scale": 0.0, "causal": 1, "softcap": 0.0, "window": 0, **attributes}
    text = ", ".join(f"{name}: {type(value).__name__} = {value}" for name, value in settings.items())
    rows = f"float[batch,{{}},sequence,{head_dim}]"
    return f"""
        <ir_version: 11, opset_import: ["": 24, "semkv": 1]>
        decoder ({rows.format(heads)} query, {rows.format(kv_heads)} key, {rows.format(kv_heads)} value,
                 {cache} past_key_values__00__key, {cache} past_key_values__00__value,
                 float[batch,{kv_heads},capacity] slot_bias__00, int64[batch] length)
            => ({rows.format(heads)} output, {cache} present__00__key, {cache} present__00__value)
        {{
            output, present__00__key, present__00__value = semkv.NexusAttention <{text}> (
                query, key, value, past_key_values__00__key, past_key_values__00__value, slot_bias__00, length)
        }}
        """


def inputs(
    batch: int, heads: int, kv_heads: int, rows: int, capacity: int, length: list[int], seed: int = 0, head_dim: int = D
) -> Any:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    dead = np.arange(capacity) >= np.array(length)[:, None]
    # Dead slots hold large values: they must not show.
    scale = np.where(dead, 1e4, 1).astype(np.float32)[:, None, :, None]
    return {
        "query": normal(batch, heads, rows, head_dim),
        "key": normal(batch, kv_heads, rows, head_dim),
        "value": normal(batch, kv_heads, rows, head_dim),
        "past_key_values.00.key": scale * normal(batch, kv_heads, capacity, head_dim),
        "past_key_values.00.value": scale * normal(batch, kv_heads, capacity, head_dim),
        "slot_bias.00": np.log(random.integers(1, 9, (batch, kv_heads, capacity))).astype(np.float32),
        "length": np.array(length, np.int64),
    }

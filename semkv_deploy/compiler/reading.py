"""A text as the uncompressed model reads it, and reads it again: keys, values, and how much each slot is looked at.

A key that no query looks at while the model reads its own context again can go, whatever is asked later (KVzip, arXiv
2505.23416). Reading again costs a second prefill, so it is done here, when a bundle is built, and what is learned from
it goes into the bundle: capacities by layer or head, and weights that predict what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.compiler.calibrate import MIN_TOKENS, append, calibration_text, decoder_engine
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.calibration import Reading
from semkv_deploy.methods.full import Full
from semkv_deploy.methods.record_attention import record_attention
from semkv_deploy.methods.slot_attention import RECORD, SLOT_ATTENTION, with_slot_attention
from semkv_deploy.model.cache_groups import one_a_layer
from semkv_deploy.targets.onnxruntime.build import lower_decoder, save_decoder

if TYPE_CHECKING:
    from semkv_deploy.methods.layout import CacheLayout
    from semkv_deploy.model.cache_groups import CacheGroup
    from semkv_deploy.model.config import ModelFacts
    from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

READ_TOKENS = 1024
"""Tokens of a piece of the text that is read and read again at most."""

MAX_PIECES = 12
"""Pieces at most: reading a piece twice takes SmolLM2-135M some five seconds."""

PIECE = 128
"""Tokens that are read again at a time: each piece sees the context and itself, as KVzip's chunks do. Nothing
asks for a repetition."""


class _Recorded(Full):
    """An uncompressed cache with one buffer more, in which the decoder records attention."""

    def layout(self, model: ModelFacts, groups: Sequence[CacheGroup]) -> CacheLayout:
        return with_slot_attention(super().layout(model, groups))


def reading_tokens(tokenizer: Any, model: ModelFacts, text: str | None) -> list[list[int]]:
    """The text's token ids (None: the one that ships with the package) in pieces.

    Raises:
        SemkvError: when the text is too short, or the model's context is.
    """
    tokens: list[int] = tokenizer.encode(text if text is not None else calibration_text(), add_special_tokens=False)
    size = min(READ_TOKENS, model.max_position - PIECE)
    # Even pieces: none is a short rest, in which little competes for attention.
    count = min(MAX_PIECES, max(1, len(tokens) // max(size, 1)))
    pieces = [tokens[start : start + size] for start in range(0, count * size, max(size, 1))]
    if size < MIN_TOKENS or len(pieces[0]) < MIN_TOKENS:
        raise SemkvError(
            "too short to calibrate on",
            where="--calibration-text" if size >= MIN_TOKENS else f"a context of {model.max_position} tokens",
            expected=f"{MIN_TOKENS} tokens or more, beside {PIECE} that repeat them",
            got=len(tokens),
        )
    return pieces


def read_again(
    portable: Path,
    folder: Path,
    model: ModelFacts,
    pieces: list[list[int]],
    progress: Callable[[float], None] = lambda share: None,
) -> list[Reading]:
    """Reads every piece of a text, and then again with the first reading in the cache.

    Args:
        portable: a decoder with one cache group a layer.
        folder: where the lowered decoder is written; it is removed afterwards.
    """
    path = folder / "recorded.onnx"
    save_decoder(lower_decoder(portable, bias="none", groups=model.layers, rewrite=record_attention), path)
    groups = one_a_layer(model.layers, model.kv_heads)
    engine = decoder_engine(path, model, groups, max(map(len, pieces)) + PIECE, _Recorded())
    readings = []
    for number, tokens in enumerate(pieces):
        readings.append(_read(engine, tokens))
        progress((number + 1) / len(pieces))
    for file in folder.glob(f"{path.name}*"):
        file.unlink()
    return readings


def _read(engine: OnnxRuntimeEngine, tokens: list[int]) -> Reading:
    layers, count = range(len(engine.contract.cache.groups)), len(tokens)
    for start in range(0, count, PIECE):
        append(engine, tokens[start : start + PIECE], start)
    keys, values = ([engine.read(name, layer)[0, :, :count].copy() for layer in layers] for name in ("key", "value"))
    engine.reset()
    for start in range(0, count, PIECE):
        # Every piece in the place of the one before it.
        append(engine, tokens[start : start + PIECE], count, given={RECORD.name: np.ones(2, np.int64)})
    attention = [engine.read(SLOT_ATTENTION.name, layer)[0, :, :count].copy() for layer in layers]
    return Reading(keys, values, attention)

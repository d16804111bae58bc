"""Two decoder graphs over one set of caches, as a host runs the layout "split": prompts by one, steps by the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SplitEngine(OnnxRuntimeEngine):
    """An engine whose decoder takes all rows and one token, and whose other graph takes one row's prompt.

    Args:
        prefill: graph of prompts; its caches are one row of the decoder's.
        decode, compressor, options: see `OnnxRuntimeEngine`.
    """

    def __init__(self, prefill: Path, decode: Path, compressor: Path | None, **options: Any) -> None:
        super().__init__(decode, compressor, **options)
        graph = OnnxRuntimeEngine(prefill, None, **{**options, "batch": 1})
        # The layers are one list: a compression that exchanges a layer's buffers does so for both graphs.
        self._prompts = copy.copy(self)
        self._prompts._decoder, self._prompts._inputs = graph._decoder, graph._inputs
        self._prompts._folded = graph._folded

    def run(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        length: NDArray[np.int64],
        row: int | None = None,
    ) -> NDArray[np.float32]:
        engine = self if row is None else self._prompts
        return OnnxRuntimeEngine.run(engine, tokens, positions, logits_index, length, row)

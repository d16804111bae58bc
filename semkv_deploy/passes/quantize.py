"""Weight-only quantisation of a lowered decoder, by onnxruntime's own quantiser."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx


BLOCK_SIZE = 32


def quantize_weights(path: Path, weights: Literal["int8", "int4"]) -> onnx.ModelProto:
    """The model at `path` with its constant MatMuls as `MatMulNBits` (blocks of 32, int8 activations in the kernel).

    Symmetric: zero points gain no accuracy on SmolLM2 and cost a quarter more time a token; float zero points (HQQ)
    would be exact for GGUF's Q4_1 but take a kernel that is 8 times slower.
    """
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    logging.getLogger(nbits.__name__).setLevel(logging.WARNING)
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(path),
        bits=4 if weights == "int4" else 8,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        # Level 4 multiplies in int8, as onnxruntime-genai's CPU models do; level 0 is 4 times slower here.
        accuracy_level=4,
    )
    quantizer.process()
    return quantizer.model.model

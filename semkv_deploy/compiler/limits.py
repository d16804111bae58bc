"""What stops a build that would not be sound: limits of kernels before the work, numbers that are none after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.onnxruntime import HEAD_SIZE_MULTIPLE

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_source_limits(source: str) -> None:
    """Reads the head size from a checkpoint's config.json, if there is one to be read, and checks it.

    Raises:
        SemkvError: as `check_head_size`.
    """
    try:
        config: Any = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError):
        return  # what is wrong with it, its loading says
    if isinstance(size, int):
        check_head_size(size, source)


def check_head_size(size: int, where: object) -> None:
    """Checks that attention kernels take heads of `size` values.

    Raises:
        SemkvError: when ONNX Runtime's, which every build calibrates with, do not.
    """
    if size <= 0 or size % HEAD_SIZE_MULTIPLE:
        raise SemkvError(
            "the model's head size is one that ONNX Runtime's attention does not take",
            where=where,
            expected=f"a multiple of {HEAD_SIZE_MULTIPLE}",
            got=size,
            fix="export it: the portable graph runs in any runtime",
        )


def check_finite(logits: NDArray[np.float32], where: object) -> None:
    """Checks that the logits `[n,V]` of a text are numbers.

    Raises:
        SemkvError: naming the first token whose logits hold NaN or infinity.
    """
    bad = np.atleast_1d(~np.isfinite(logits).all(-1))
    if bad.any():
        first = int(bad.argmax())
        raise SemkvError(
            "the model's logits are not finite numbers",
            where=where,
            got=f"NaN or infinity at {int(bad.sum())} of {len(bad)} tokens, the first at token {first}",
            fix="check the weights, or store them with --weights fp32",
        )

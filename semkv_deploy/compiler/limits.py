"""What stops a build that would not be sound: limits of kernels and targets before the work, no numbers after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.onnxruntime import HEAD_SIZE_MULTIPLE
from semkv_deploy.targets import is_tensorrt, require_available
from semkv_deploy.targets.onnxruntime.native import CUDA_HEAD_SIZES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.choices import CacheType
    from semkv_deploy.methods import Method
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions


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


def check_cuda_head_size(size: int, targets: Sequence[str]) -> None:
    """Checks that the CUDA kernels of `onnxruntime-cuda`, if that is a target, take heads of `size` values.

    Raises:
        SemkvError: when they do not.
    """
    if "onnxruntime-cuda" in targets and size not in CUDA_HEAD_SIZES:
        raise SemkvError(
            "the model's head size is one that the CUDA kernels do not take",
            where="--target onnxruntime-cuda",
            expected=" or ".join(map(str, CUDA_HEAD_SIZES)),
            got=size,
            fix="build for onnxruntime-cpu or tensorrt",
        )


def check_targets(targets: Sequence[str], options: TensorRTOptions) -> None:
    """Fails before minutes of work where a target cannot be built here.

    Raises:
        SemkvError: see `targets.require_available` and `targets.tensorrt.build.check_options`.
    """
    from semkv_deploy.targets.tensorrt.build import check_options

    for name in targets:
        require_available(name, engines=options.engines)
        if is_tensorrt(name):
            check_options(name, options)


def check_reading(method: Method, targets: Sequence[str]) -> None:
    """Fails where a target has no decoder that records attention, and the method needs one.

    Raises:
        SemkvError: naming the target.
    """
    for name in targets:
        if method.reads_again and is_tensorrt(name):
            raise SemkvError(
                f"{method.kind} with queries=repeat reads the context again and needs a decoder that records it",
                where=f"--target {name}",
                expected="onnxruntime-cpu",
                fix="leave the target out, or predict what would be looked at: --method-option queries=predicted",
            )


def check_selecting(
    method: Method, targets: Sequence[str], cache_dtype: CacheType, options: TensorRTOptions, *, native: bool
) -> None:
    """Fails where a target's steps cannot attend to chosen slots.

    TensorRT-RTX 1.7.1 parses an `If` with a fused attention in each branch, and its builder fails on it ("Called with
    unknown input tensor"); so prompts and steps are two engines.

    Args:
        native: whether ONNX Runtime has native operators.

    Raises:
        SemkvError: naming the option.
    """
    if not method.selects:
        return
    for name in targets:
        if is_tensorrt(name) and options.layout != "split":
            raise SemkvError(
                f"{method.kind}: steps attend to chosen slots and prompts to all, which takes an engine for each",
                where=f"--target {name} --layout {options.layout}",
                expected="split",
                fix="add --layout split",
            )
    if method.bias_mode != "none" and not native and not all(map(is_tensorrt, targets)):
        raise SemkvError(
            f"{method.kind}: slots that are chosen have no biases without native operators",
            where="--native off",
            expected="--method-option fit=none",
            got=f"slot biases by {method.bias_mode}",
            fix="build the operators with scripts/build_native.sh, or fit nothing",
        )
    if cache_dtype != "float32" and not all(map(is_tensorrt, targets)):
        raise SemkvError(
            f"{method.kind} has no operators for such caches on ONNX Runtime",
            where="--cache-dtype",
            expected="float32",
            got=cache_dtype,
            fix="leave the option out, or use --method dynsplit",
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

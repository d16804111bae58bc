"""What is measured, a file each: one model with one kind of cache, in the process that it is measured in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semkv_deploy.bench.engines.base import Engine


def open_engine(kind: str, options: dict[str, Any]) -> Engine:
    """The engine of a kind: `bundle`, `genai`, `llama_cpp`, `transformers`.

    Args:
        options: what its class takes.

    Raises:
        SemkvError: when a package is missing, or the model does not load.
    """
    if kind == "bundle":
        from semkv_deploy.bench.engines.bundle import BundleEngine

        return BundleEngine(**options)
    if kind == "genai":
        from semkv_deploy.bench.engines.genai import GenaiEngine

        return GenaiEngine(**options)
    if kind == "llama_cpp":
        from semkv_deploy.bench.engines.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(**options)
    if kind == "transformers":
        from semkv_deploy.bench.engines.transformers import TransformersEngine

        return TransformersEngine(**options)
    raise ValueError(kind)

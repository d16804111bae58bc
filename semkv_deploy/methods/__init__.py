"""Compression methods, by name. One file a method; `base.Method` is their interface."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.full import Full
from semkv_deploy.methods.semanticache import SemantiCache
from semkv_deploy.methods.streaming_llm import StreamingLLM

METHODS: dict[str, type[SemantiCache] | type[StreamingLLM] | type[Full]] = {
    "semanticache": SemantiCache,
    "streaming-llm": StreamingLLM,
    "full": Full,
}

AnyMethod = Annotated[SemantiCache | StreamingLLM | Full, Field(discriminator="kind")]
"""For manifests: the method a mapping with a `kind` stands for."""


def method_from_options(kind: str, options: dict[str, Any]) -> AnyMethod:
    """A method from its name and parameters.

    Raises:
        SemkvError: on an unknown name or parameter, or a value out of range.
    """
    if kind not in METHODS:
        raise SemkvError("unknown method", where="--method", expected=" or ".join(METHODS), got=kind)
    try:
        return METHODS[kind].model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(field for field in METHODS[kind].model_fields if field != "kind")
        raise SemkvError(
            f"{kind} does not take {name}: {first['msg']}",
            where="--method-option",
            expected=f"parameters of {kind}: {allowed}",
            got=f"{name}={first['input']!r}",
        ) from None

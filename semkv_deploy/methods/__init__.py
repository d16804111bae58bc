"""Compression methods, by name. One file a method; `base.Method` is their interface.

`METHODS` is the only registry: the command line, the manifest's types and the tests' matrix derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.base import Method
from semkv_deploy.methods.dynsplit import DynSplit
from semkv_deploy.methods.dynsplit_select import DynSplitSelect
from semkv_deploy.methods.full import Full
from semkv_deploy.methods.importance import Importance
from semkv_deploy.methods.semanticache import SemantiCache
from semkv_deploy.methods.sonic import Sonic
from semkv_deploy.methods.streaming_llm import StreamingLLM

METHODS: dict[str, type[Method]] = {
    method.model_fields["kind"].default: method
    for method in (Importance, SemantiCache, DynSplit, DynSplitSelect, Sonic, StreamingLLM, Full)
}
"""Methods by name; the first is the default."""


def _method(value: Any) -> Any:
    """A method from a mapping with a `kind`, by whatever is registered now.

    Raises:
        SemkvError: when nothing is registered under the kind; a class that is not of this package may have to be
            imported first.
    """
    if isinstance(value, Mapping):
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in METHODS:
            raise SemkvError(
                "unknown method",
                where="method.kind",
                expected=" or ".join(METHODS),
                got=repr(kind),
                fix="import the module that registers the method, before the bundle is opened",
            )
        return METHODS[kind].model_validate(value)
    return value


AnyMethod = Annotated[SerializeAsAny[Method], BeforeValidator(_method)]
"""For manifests: the method a mapping with a `kind` stands for."""


def register(method: type[Method]) -> type[Method]:
    """Adds a method under its `kind`, so that commands and manifests know it. Usable as a decorator.

    Raises:
        ValueError: when the name is taken, or the class gives `kind` no default.
    """
    kind = method.model_fields["kind"].default
    if not isinstance(kind, str) or METHODS.get(kind, method) is not method:
        raise ValueError(f"a method needs a kind of its own, got {kind!r}")
    METHODS[kind] = method
    return method


def method_from_options(kind: str, options: dict[str, Any]) -> Method:
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

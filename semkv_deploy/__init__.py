"""semkv-deploy: build and run decoder LLMs whose KV cache is compressed under a fixed memory budget.

The public API is the names of `__all__`. Each is imported when it is first used, so that `import semkv_deploy` costs
nothing. `export` and `validate` are packages, so the functions say what they take: `export_model`, `build_bundle`,
`validate_bundle`. Methods are in `semkv_deploy.methods`, samplers in `semkv_deploy.runtime.sampling`, options for
TensorRT in `semkv_deploy.targets.tensorrt.build`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semkv_deploy.bundle import Bundle
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.errors import SemkvError
    from semkv_deploy.export import export_model
    from semkv_deploy.methods import Method, register
    from semkv_deploy.runtime.open import open_bundle, open_session
    from semkv_deploy.runtime.session import Session
    from semkv_deploy.runtime.tokens import load_tokenizer
    from semkv_deploy.validate.run import validate as validate_bundle

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Method",
    "SemkvError",
    "Session",
    "__version__",
    "build_bundle",
    "export_model",
    "load_tokenizer",
    "open_bundle",
    "open_session",
    "register",
    "validate_bundle",
]

_FROM = {
    "Bundle": ("bundle", "Bundle"),
    "Method": ("methods", "Method"),
    "SemkvError": ("errors", "SemkvError"),
    "Session": ("runtime.session", "Session"),
    "build_bundle": ("compiler.pipeline", "build_bundle"),
    "export_model": ("export", "export_model"),
    "load_tokenizer": ("runtime.tokens", "load_tokenizer"),
    "open_bundle": ("runtime.open", "open_bundle"),
    "open_session": ("runtime.open", "open_session"),
    "register": ("methods", "register"),
    "validate_bundle": ("validate.run", "validate"),
}
"""Where each name is: module of the package, and its name there."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _FROM:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _FROM[name]
        value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

"""The uncompressed cache: what everything else is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

from semkv_deploy.methods.base import Method


class Full(Method):
    """Keeps every token; a conversation ends where the capacity does."""

    kind: Literal["full"] = "full"

    compresses: ClassVar[bool] = False

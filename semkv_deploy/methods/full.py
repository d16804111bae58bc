"""The uncompressed cache: what everything else is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from semkv_deploy.methods.base import Method

if TYPE_CHECKING:
    from semkv_deploy.model.config import ModelFacts


class Full(Method):
    """Keeps every token; a conversation ends where the capacity does."""

    kind: Literal["full"] = "full"

    def compressor(self, facts: ModelFacts) -> None:
        return None

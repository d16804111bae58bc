"""Token ids to text and back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from semkv_deploy.model.exported import TOKENIZER


def load_tokenizer(root: Path) -> Any:
    """The tokenizer of a bundle, chat template included, from files that are verified as they are read.

    Args:
        root: the bundle's directory; or one that `build` is writing, which has no manifest yet and is not verified.

    Raises:
        SemkvError: when a file of it is altered or not listed, or transformers cannot load it without running code.
    """
    from semkv_deploy.bundle import MANIFEST, Bundle
    from semkv_deploy.model.tokenizer import read_tokenizer

    if not os.path.lexists(root / MANIFEST):
        return read_tokenizer(root / TOKENIZER)
    bundle = Bundle.open(root, only=[f"{TOKENIZER}/"])
    with tempfile.TemporaryDirectory() as folder:
        for name in bundle.manifest.files:
            if name.startswith(f"{TOKENIZER}/"):
                copy = Path(folder) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(bundle.read(name))
        return read_tokenizer(Path(folder) / TOKENIZER)


class TextStream:
    """Text of a growing token list, without halves of characters.

    Byte-level tokens can end inside a UTF-8 sequence, which decodes to U+FFFD until the rest arrives.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

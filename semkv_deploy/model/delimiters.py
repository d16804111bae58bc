"""Delimiter token ids of a model, as exports and bundles store them; `export.delimiters` chooses them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SYMBOLS = ".,?!;:。，？！；：、"
"""Characters that end a unit; white space does as well."""

CLOSERS = "\"'”’)]}」』）】》"
"""Characters that may stand around a symbol in one token, but are no delimiters on their own."""


@dataclass(frozen=True)
class Delimiters:
    """The delimiter token ids, ascending, and the parameters of the rule that chose them."""

    token_ids: tuple[int, ...]
    special_token_ids: tuple[int, ...]
    symbols: str = SYMBOLS
    closers: str = CLOSERS

    def write(self, path: Path) -> None:
        """Writes as JSON; the same delimiters give the same bytes."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Delimiters:
        """Reads what `write` wrote.

        Raises:
            SemkvError: when the file is missing or is not such a file.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SemkvError("not a delimiter file", where=path, got=error, fix="export the model again") from error
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Delimiters:
        """Reads what `write` wrote to `path`, from its bytes.

        Raises:
            SemkvError: when it is not such a file.
        """
        try:
            fields: dict[str, Any] = json.loads(content)
            for name in ("token_ids", "special_token_ids"):
                fields[name] = tuple(int(token) for token in fields[name])
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise SemkvError("not a delimiter file", where=path, got=error, fix="export the model again") from error

    def table(self, vocab_size: int) -> NDArray[np.bool_]:
        """`[vocab]` bool, true for delimiters (ids past the model's vocabulary are ignored)."""
        import numpy as np

        table = np.zeros(vocab_size, bool)
        table[[token for token in self.token_ids if 0 <= token < vocab_size]] = True
        return table


class ChunkCounter:
    """Numbers the chunks of a growing text: a chunk opens with the first token that is no delimiter after one that is.

    A delimiter has the number of the chunk it closes.
    """

    def __init__(self, chunk: int = 0, after_delimiter: bool = False) -> None:
        self.chunk, self.after_delimiter = chunk, after_delimiter

    def copy(self) -> ChunkCounter:
        """A counter that goes on from the same place."""
        return ChunkCounter(self.chunk, self.after_delimiter)

    def count(self, delimiter: NDArray[np.bool_]) -> NDArray[np.int64]:
        """`slot_chunk` of the next tokens: `2 * chunk + (1 if delimiter)`; `delimiter` `[n]`, n > 0."""
        import numpy as np

        if len(delimiter) == 1:
            # A decode step, where an array's operations would take longer than all else that is counted.
            ends = bool(delimiter[0])
            self.chunk += self.after_delimiter and not ends
            self.after_delimiter = ends
            return np.array([2 * self.chunk + ends], np.int64)
        before = np.concatenate(([self.after_delimiter], delimiter[:-1]))
        chunk = self.chunk + np.cumsum(before & ~delimiter)
        self.chunk, self.after_delimiter = int(chunk[-1]), bool(delimiter[-1])
        return (2 * chunk + delimiter).astype(np.int64)

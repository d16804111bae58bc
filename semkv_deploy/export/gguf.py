"""The header of a GGUF file, read within bounds, and what it says about parts, ends of turns and rotation.

transformers reads GGUF tensors by name and passes over those it has no name for, and it knows nothing of files in
several parts; so the header is read here first.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semkv_deploy.errors import SemkvError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Under `tokenizer.ggml`: the ends of a text, a turn and a message."""

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, one a pair (Llama 3.1 and later); transformers passes over them."""


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the tensor table: offset in bytes from the start of the data, size in bytes."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (scalars and strings; arrays are left out), the tensor table and where the data starts."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, a turn or a message, ascending."""
        ids = {self.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS}
        return tuple(sorted(value for value in ids if isinstance(value, int)))

    @property
    def sizes(self) -> dict[str, Any]:
        """The model's sizes by transformers' names; those that differ by layer are left out."""
        architecture = self.metadata["general.architecture"]
        return {name: self.metadata.get(f"{architecture}.{key}") for key, name in _SIZES.items()}


_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Names of sizes after the architecture's name, and transformers' names for them."""


class _Cursor:
    """Reads little-endian values from a mapped file and never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, inside a value at byte {self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A metadata value; None for an array, which is skipped."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind} at byte {self.at}")
        element, count = self.scalar("<I"), self.scalar("<Q")
        if element in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self.take(self.scalar("<Q"))
        else:
            raise ValueError(f"an array of unknown type {element} at byte {self.at}")
        return None


def read_header(path: Path) -> GgufHeader:
    """Reads the header of a GGUF file of version 2 or 3 and checks that the file holds all its tensors.

    Raises:
        SemkvError: when the header contradicts itself or the file is truncated.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data))
    except (ValueError, struct.error) as error:
        raise SemkvError(f"the GGUF file is damaged: {error}", where=path, fix="download it again") from None


def _parse(cursor: _Cursor) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES

    cursor.take(8)
    tensor_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("no general.architecture in its metadata")
    entries = []
    for _ in range(tensor_count):
        name, count = cursor.string(), cursor.scalar("<I")
        if count > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} of {count} dimensions")
        dims = tuple(cursor.scalar("<Q") for _ in range(count))
        entries.append((name, dims, cursor.scalar("<I"), cursor.scalar("<Q")))
    alignment = metadata.get("general.alignment") or 32
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise ValueError(f"alignment {alignment}")
    start = -(-cursor.at // alignment) * alignment
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    tensors = []
    for name, dims, kind, offset in entries:
        if kind not in sizes:
            raise ValueError(f"tensor {name} of unknown type {kind}")
        elements, block = sizes[kind]
        count = math.prod(dims)
        if count % elements:
            raise ValueError(f"tensor {name} of {count} values, in blocks of {elements}")
        size = count // elements * block
        if start + offset + size > len(cursor.data):
            raise ValueError(f"tensor {name} ends at byte {start + offset + size} of {len(cursor.data)}")
        tensors.append(GgufTensor(name, dims, kind, offset, size))
    return GgufHeader(metadata, tuple(tensors), start)


def check_parts(path: Path, header: GgufHeader) -> None:
    """Refuses a file that is one part of several.

    Raises:
        SemkvError: with the command that merges the parts.
    """
    named = _PART.search(path.name)
    parts = header.metadata.get("split.count")
    if not isinstance(parts, int):
        parts = int(named.group(2)) if named else 1
    if parts <= 1:
        return
    first = _PART.sub(f"-00001-of-{parts:05d}.gguf", path.name) if named else path.name
    merged = _PART.sub(".gguf", path.name) if named else f"merged-{path.name}"
    raise SemkvError(
        "the file is one part of a split GGUF",
        where=path,
        expected="the whole model in one file",
        got=f"1 of {parts} parts",
        fix=f"merge them: llama-gguf-split --merge {first} {merged}",
    )

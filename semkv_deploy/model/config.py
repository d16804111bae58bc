"""What the later stages need to know about a model, and nothing that ties it to the machine it was exported on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from torch import Tensor


class Rotary(BaseModel):
    """The rotation every layer applies to its keys: enough to undo it.

    Pair i of the first `dim` values of a key at position p turns by p * inv_freq[i]; then those values are multiplied
    by attention_scaling. Pairs are (i, i + dim/2), or (2i, 2i + 1) when interleaved. Values past `dim` are left alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inv_freq: tuple[float, ...] = Field(description="radians per position, one per pair")
    attention_scaling: float
    dim: int = Field(description="how many of the head's values are rotated")
    interleaved: bool

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Turn keys [..., head_dim] by their positions [...] (any float or int dtype); negative positions turn back.

        The scaling is left out, so rotate(rotate(k, p), -p) is k.
        """
        import torch

        angles = positions[..., None].to(keys.dtype) * torch.tensor(self.inv_freq, dtype=keys.dtype)
        cos, sin = angles.cos(), angles.sin()
        head, rest = keys[..., : self.dim], keys[..., self.dim :]
        if self.interleaved:
            first, second = head[..., 0::2], head[..., 1::2]
        else:
            first, second = head[..., : self.dim // 2], head[..., self.dim // 2 :]
        turned = (first * cos - second * sin, second * cos + first * sin)
        mixed = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        return torch.cat((mixed, rest), dim=-1)


class ModelFacts(BaseModel):
    """A decoder's shape and provenance; `model.json` of an export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str = Field(description="transformers' model_type, e.g. llama")
    source: str = Field(description="base name of the checkpoint, never a path")
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int = Field(description="width of the logits; the tokenizer may have fewer entries")
    max_position: int = Field(description="longest sequence the model was made for, in tokens")
    dtype: str = Field(description="element type of weights and caches")
    eos_token_ids: tuple[int, ...]
    windows: tuple[int, ...] = Field(description="per layer: width of its sliding window in tokens, 0 for none")
    rotary: Rotary | None = Field(description="None when the layers share no single rotary table")
    versions: dict[str, str] = Field(description="of the packages that made the export")

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of key and value of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * {"float32": 4, "float16": 2, "bfloat16": 2}[self.dtype]

    def write(self, path: Path) -> None:
        """Write as JSON; the same facts give the same bytes."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ModelFacts:
        """Read what `write` wrote. Raises SemkvError when the file is missing or is not such a file."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SemkvError("not a model description", where=path, got=error, fix="export the model again") from error

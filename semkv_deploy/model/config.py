"""What the later stages need to know about a model, and nothing that ties it to the machine it was exported on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from semkv_deploy.budget_units import MAX_TOKENS
from semkv_deploy.errors import SemkvError
from semkv_deploy.sizes import row_bytes

if TYPE_CHECKING:
    from torch import Tensor


MAX_WIDTH = 1 << 14
"""Values of a head at most."""


LARGEST = {
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": MAX_WIDTH,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": MAX_TOKENS,
}
"""The largest sizes that a configuration may name. transformers makes what it names before any weight is looked at."""


def check_sizes(sizes: Mapping[str, object], where: object) -> None:
    """Compares sizes, by the names of `LARGEST`, with what a model can have; what differs by layer is not compared.

    Raises:
        SemkvError: naming the size.
    """
    for name, most in LARGEST.items():
        value = sizes.get(name)
        if value is None or isinstance(value, list | tuple):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise SemkvError(f"{name} is none of a model", where=where, expected=f"1 to {most}", got=repr(value))


def named_sizes(config: Any) -> dict[str, object]:
    """Sizes of a transformers configuration, whatever the family calls them."""
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in LARGEST}


class Rotary(BaseModel):
    """The rotation every layer applies to its keys: enough to undo it.

    Pair i of the first `dim` values of a key at position p turns by p * inv_freq[i]; then those values are multiplied
    by attention_scaling. Pairs are (i, i + dim/2), or (2i, 2i + 1) when interleaved. Values past `dim` are left alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inv_freq: tuple[FiniteFloat, ...] = Field(description="radians per position, one per pair", max_length=MAX_WIDTH)
    attention_scaling: FiniteFloat
    dim: int = Field(ge=2, le=MAX_WIDTH, description="how many of the head's values are rotated")
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
    layers: int = Field(ge=1, le=1 << 12)
    query_heads: int = Field(ge=1, le=1 << 12)
    kv_heads: int = Field(ge=1, le=1 << 12)
    head_dim: int = Field(ge=1, le=MAX_WIDTH)
    hidden_size: int = Field(ge=1, le=1 << 24)
    vocab_size: int = Field(ge=1, le=1 << 24, description="width of the logits; the tokenizer may have fewer entries")
    max_position: int = Field(ge=1, le=MAX_TOKENS, description="longest sequence the model was made for, in tokens")
    dtype: str = Field(pattern="^(float32|float16|bfloat16)$", description="element type of weights and caches")
    eos_token_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 24)], ...]
    windows: tuple[Annotated[int, Field(ge=0, le=MAX_TOKENS)], ...] = Field(
        description="per layer: width of its sliding window in tokens, 0 for none"
    )
    rotary: Rotary | None = Field(description="None when the layers share no single rotary table")
    versions: dict[str, str] = Field(description="of the packages that made the export")

    @model_validator(mode="after")
    def _fits_together(self) -> ModelFacts:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads are no multiple of {self.kv_heads} KV heads")
        if len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers")
        rotary = self.rotary
        if rotary is not None and not 2 * len(rotary.inv_freq) == rotary.dim <= self.head_dim:
            raise ValueError(f"{len(rotary.inv_freq)} rotary frequencies turn {rotary.dim} of {self.head_dim} values")
        return self

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of key and value of one token, all layers."""
        return 2 * self.layers * self.kv_heads * row_bytes(self.dtype, self.head_dim)

    def write(self, path: Path) -> None:
        """Write as JSON; the same facts give the same bytes."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ModelFacts:
        """Read what `write` wrote. Raises SemkvError when the file is missing or is not such a file."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            got: object = error
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise SemkvError("not a model description", where=path, got=got, fix="export the model again") from error

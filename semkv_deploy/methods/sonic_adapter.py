"""What SONIC learns, as one safetensors file: rows for Nexus tokens and LoRA weights for the rows that are such.

SONIC (arXiv 2601.21927) names a base embedding and an additive embedding of the turn; its file format, and an adapter
that acts on Nexus rows only, are our completion (the latter after Compressed Context Memory, arXiv 2312.03414).

Row j of turn t (both from 0) enters the model as `nexus.embedding[j] + turn.embedding[min(t, turns_max - 1)]`, in a
spread adapter with the embedding of the token that it begins as added, and on such rows a linear module's output has
`lora_B @ (lora_A @ x)` added to it; other rows are the base model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.spread import Placement

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS: Mapping[Placement, str] = {"appended": "semkv-sonic-1", "spread": "semkv-sonic-2"}
"""What the file says it is, by placement: what knows the first only must refuse the second."""

NEXUS, TURN = "nexus.embedding", "turn.embedding"
"""Names of the two tables: `[k_max,H]` and `[turns_max,H]`."""

COMMON = "common.tokens"
"""Name of the tensor of common tokens, int32 `[n]`, where there are any."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear modules of a layer that LoRA weights may be for."""

BASE_ROWS = 1024
"""Rows of the base model's input embeddings whose bytes identify it."""

Corner = Literal["causal", "full"]
"""What Nexus rows of one turn see of each other: the earlier ones, or all."""

_LORA = re.compile(rf"layers\.(\d+)\.({'|'.join(MODULES)})\.lora_([AB])")
_NUMBERS = ("k_max", "turns_max", "rank", "hidden", "layers")
_FIX = "give a file that `semkv-deploy train` wrote"


@dataclass(frozen=True)
class SonicAdapter:
    """An adapter as it is in its file.

    Attributes:
        tensors: float32 by name: both tables, and `layers.{i}.{module}.lora_A` `[rank,in]` with `.lora_B` `[out,rank]`
            (its scale multiplied in) for each module that has LoRA weights.
        base: SHA-256 of the base model's first embedding rows, as `fingerprint` gives it.
        rank: of the LoRA weights; 0 where there are none.
        hidden, layers: of the base model.
        placement: where a turn's Nexus rows stand.
        common: tokens that spread rows begin as last, from the most common one on (`model.spread`).
        trained: how it was made: steps, tokens, recipe.
    """

    tensors: Mapping[str, NDArray[np.float32]]
    base: str
    k_max: int
    turns_max: int
    rank: int
    hidden: int
    layers: int
    corner: Corner = "causal"
    placement: Placement = "appended"
    common: tuple[int, ...] = ()
    trained: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[tuple[int, str], ...]:
        """(layer, module) of each pair of LoRA weights, in order."""
        found = {(int(m[1]), m[2]) for name in self.tensors if (m := _LORA.fullmatch(name))}
        return tuple(sorted(found, key=lambda key: (key[0], MODULES.index(key[1]))))

    def lora(self, layer: int, module: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`lora_A` `[rank,in]` and `lora_B` `[out,rank]` of a module that `modules` names."""
        name = f"layers.{layer}.{module}.lora_"
        return self.tensors[f"{name}A"], self.tensors[f"{name}B"]

    def rows(self, turn: int, count: int) -> NDArray[np.float32]:
        """`[count,H]` input embeddings of a turn's first `count` Nexus rows; turns count from 0."""
        if not 0 <= count <= self.k_max or turn < 0:
            raise SemkvError("no such Nexus rows", expected=f"at most {self.k_max}, of turn 0 or later", got=count)
        return self.tensors[NEXUS][:count] + self.tensors[TURN][min(turn, self.turns_max - 1)]


def fingerprint(embedding: NDArray[Any]) -> str:
    """SHA-256, in hex, of the little-endian float32 bytes of the first 1,024 rows of input embeddings `[V,H]`."""
    return hashlib.sha256(np.ascontiguousarray(embedding[:BASE_ROWS], dtype="<f4").tobytes()).hexdigest()


def check_base(adapter: SonicAdapter, embedding: NDArray[Any], layers: int, where: object = "adapter") -> None:
    """Compares an adapter with the model it is to be put on.

    Args:
        embedding: the model's input embeddings `[V,H]`, before any quantisation; its first 1,024 rows are enough.
        layers: of the model.

    Raises:
        SemkvError: when the adapter was trained for another base model.
    """
    fix = "take the adapter that was trained for this model, or train one: semkv-deploy train"
    for what, expected, got in (
        ("hidden size", adapter.hidden, embedding.shape[1]),
        ("number of layers", adapter.layers, layers),
        ("first embedding rows (SHA-256)", adapter.base[:16], fingerprint(embedding)[:16]),
    ):
        if expected != got:
            raise SemkvError(
                f"the adapter is for another base model: its {what} differs", where=where,
                expected=expected, got=got, fix=fix,
            )  # fmt: skip


def save_adapter(path: Path, adapter: SonicAdapter) -> None:
    """Writes an adapter beside its place, then renames: there is never half a file.

    Raises:
        SemkvError: when tensors and numbers contradict each other.
    """
    from safetensors.numpy import save

    _check(adapter, path)
    numbers = {name: str(getattr(adapter, name)) for name in _NUMBERS}
    metadata = {"format": FORMATS[adapter.placement], "base": adapter.base, **numbers, "corner": adapter.corner}
    metadata["trained"] = json.dumps(dict(adapter.trained), sort_keys=True)
    tensors = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in adapter.tensors.items()}
    if adapter.common:
        tensors[COMMON] = np.array(adapter.common, np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(save(tensors, metadata))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_adapter(path: Path) -> SonicAdapter:
    """Reads an adapter.

    Raises:
        SemkvError: when there is no such file, it is truncated or of another format, a tensor is missing or has the
            wrong shape, or a value is not finite.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SemkvError("no such adapter", where=path, fix=_FIX)
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in FORMATS.values():
                expected, got = f"format {' or '.join(FORMATS.values())}", repr(metadata.get("format"))
                raise SemkvError("not a SONIC adapter", where=path, expected=expected, got=got, fix=_FIX)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise SemkvError("the adapter is damaged", where=path, got=error, fix="copy it again") from None
    adapter = _from_metadata(metadata, tensors, path)
    _check(adapter, path)
    return adapter


def _from_metadata(metadata: Mapping[str, str], tensors: dict[str, NDArray[Any]], where: Path) -> SonicAdapter:
    numbers: dict[str, int] = {}
    for name in _NUMBERS:
        text = metadata.get(name, "")
        if not re.fullmatch(r"\d{1,7}", text):
            raise SemkvError(f"no number for {name} in its metadata", where=where, got=repr(text), fix=_FIX)
        numbers[name] = int(text)
    try:
        trained = json.loads(metadata.get("trained", "{}"))
    except ValueError:
        trained = None
    corner: Any = metadata.get("corner")
    if not isinstance(trained, dict) or not re.fullmatch("[0-9a-f]{64}", metadata.get("base", "")):
        raise SemkvError("base or trained is missing in its metadata", where=where, fix=_FIX)
    placement = next(each for each, name in FORMATS.items() if name == metadata["format"])
    common = tensors.pop(COMMON, np.zeros(0, np.int32))
    if common.dtype != np.int32 or common.ndim != 1:
        raise SemkvError(f"{COMMON} is not as it should be", where=where, expected="int32 [n]",
                         got=f"{common.dtype} {list(common.shape)}", fix=_FIX)  # fmt: skip
    return SonicAdapter(
        tensors=tensors, base=metadata["base"], corner=corner, placement=placement, common=tuple(common.tolist()),
        trained=trained, **numbers,
    )  # fmt: skip


def _check(adapter: SonicAdapter, where: object) -> None:
    """Compares an adapter's tensors with its numbers."""
    if adapter.corner not in get_args(Corner):
        raise SemkvError("unknown corner", where=where, expected=" or ".join(get_args(Corner)), got=adapter.corner)
    if min(adapter.k_max, adapter.turns_max, adapter.hidden, adapter.layers) < 1:
        raise SemkvError("k_max, turns_max, hidden and layers are 1 at least", where=where, fix=_FIX)
    if adapter.common and (adapter.placement != "spread" or min(adapter.common) < 0
                           or len(set(adapter.common)) < len(adapter.common)):  # fmt: skip
        raise SemkvError(f"{COMMON} has other than tokens, each once, that spread rows begin as", where=where, fix=_FIX)
    _check_tensor(adapter, NEXUS, (adapter.k_max, adapter.hidden), where)
    _check_tensor(adapter, TURN, (adapter.turns_max, adapter.hidden), where)
    for name in adapter.tensors:
        found = _LORA.fullmatch(name)
        if found is None and name not in (NEXUS, TURN):
            raise SemkvError("it has a tensor that no adapter has", where=where, got=name, fix=_FIX)
        if found is not None and int(found[1]) >= adapter.layers:
            raise SemkvError("a tensor of a layer that is not there", where=where, expected=adapter.layers, got=name)
    for layer, module in adapter.modules:
        name = f"layers.{layer}.{module}.lora_"
        _check_tensor(adapter, f"{name}A", (adapter.rank, None), where)
        _check_tensor(adapter, f"{name}B", (None, adapter.rank), where)


def _check_tensor(adapter: SonicAdapter, name: str, shape: tuple[int | None, int | None], where: object) -> None:
    tensor = adapter.tensors.get(name)
    if tensor is None:
        raise SemkvError("a tensor is missing", where=where, expected=name, fix=_FIX)
    fits = tensor.ndim == 2 and all(wanted in (None, got) for wanted, got in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != np.float32 or not fits:
        expected = f"float32 {['any' if size is None else size for size in shape]}"
        raise SemkvError(f"{name} is not as it should be", where=where, expected=expected,
                         got=f"{tensor.dtype} {list(tensor.shape)}", fix=_FIX)  # fmt: skip
    if not np.isfinite(tensor).all():
        raise SemkvError(f"{name} has values that are not finite", where=where, fix=_FIX)

"""A stranger's graph in ONNX Runtime, with the caches that it has: they grow, or they are written in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.products import FLOAT32_BLOCKS, use_float32_activations

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from semkv_deploy.export.foreign.interface import Interface

Caches = dict[str, "NDArray[Any]"]
"""By the names of the original's inputs, float32 `[B,Hkv,slots,D]`, live slots only."""

_TYPES: dict[str, Any] = {"tensor(float16)": np.float16}
"""Types of caches that are none of ours; they are converted at the door."""


class Names(NamedTuple):
    """How a stranger's caches are called, and how they are kept.

    Attributes:
        pasts: of each layer, in order: past key and value inputs, present key and value outputs.
        written_at, live: inputs of caches in place (`in_place.InPlace`); None: caches grow.
        flat: caches in place are `[B,C,Hkv*D]`.
        capacity: their slots; None: as many as one likes.
        mask_of_slots: the attention mask is as wide as caches in place.
        pieces: the graph takes several tokens after others; else they are run one by one.
    """

    pasts: tuple[tuple[str, str, str, str], ...]
    written_at: str | None = None
    live: str | None = None
    flat: bool = False
    capacity: int | None = None
    pieces: bool = True
    mask_of_slots: bool = False

    @property
    def inputs(self) -> list[str]:
        """Names of the caches' inputs, keys and values of every layer in turn."""
        return [name for layer in self.pasts for name in layer[:2]]


def names_of(roles: Interface) -> Names:
    """The names, to be taken before the graph is rewritten."""
    from semkv_deploy.export.foreign.in_place import InPlace

    pasts = tuple(
        (str(layer.past[0].name), str(layer.past[1].name), str(layer.present[0].name), str(layer.present[1].name))
        for layer in roles.layers
    )
    first = roles.layers[0]
    if not isinstance(first, InPlace):
        return Names(pasts, pieces=roles.pieces)
    return Names(
        pasts,
        str(first.written_at.name),
        str(first.live.name),
        first.flat,
        first.capacity,
        roles.pieces,
        roles.mask_of_slots,
    )


class Original:
    """A stranger's graph; `run` goes on from caches and leaves them longer.

    Args:
        path: of the graph.
        room: slots that caches in place get, where they choose none themselves.

    Raises:
        SemkvError: when ONNX Runtime does not load it.
    """

    def __init__(self, path: Path, names: Names, room: int) -> None:
        self.session, self.names = open_session(path), names
        self._types = {value.name: _TYPES.get(value.type, np.float32) for value in self.session.get_inputs()}
        self.room = names.capacity or room

    def run(self, caches: Caches, tokens: NDArray[Any], position: int) -> NDArray[Any]:
        """Logits `[B,S,V]`, float32, of tokens `[B,S]` after `position` slots."""
        batch, count = tokens.shape
        if position and count > 1 and not self.names.pieces:
            columns = [self.run(caches, tokens[:, at : at + 1], position + at) for at in range(count)]
            return np.concatenate(columns, axis=1)
        wanted = self._types
        kept = self._in_place(caches) if self.names.live else caches
        feeds: dict[str, Any] = {"input_ids": tokens}
        feeds |= {name: cache.astype(wanted[name], copy=False) for name, cache in kept.items()}
        if "attention_mask" in wanted:
            width = self.room if self.names.mask_of_slots else position + count
            feeds["attention_mask"] = np.tile(np.arange(width) < position + count, (batch, 1)).astype(np.int64)
        if "position_ids" in wanted:
            feeds["position_ids"] = np.tile(np.arange(position, position + count), (batch, 1))
        if self.names.live and self.names.written_at:
            feeds[self.names.written_at] = np.full(batch, position)
            feeds[self.names.live] = np.full(batch, position + count)
        presents = [name for layer in self.names.pasts for name in layer[2:]]
        logits = next(value.name for value in self.session.get_outputs() if value.name not in presents)
        found, *left = outputs(self.session, [logits, *presents], feeds, "the original")
        for name, value in zip(self.names.inputs, left, strict=True):
            heads = caches[name].shape[1]
            if self.names.flat:
                value = value.reshape(batch, value.shape[1], heads, -1).transpose(0, 2, 1, 3)
            live = value[:, :, : position + count] if self.names.live else value
            caches[name] = live.astype(np.float32, copy=False)
        return found.astype(np.float32, copy=False)

    def _in_place(self, caches: Caches) -> Caches:
        """Whole buffers, with numbers that are anything but 0 where no slot is live."""
        kept = {}
        for name, live in caches.items():
            batch, heads, slots, size = live.shape
            buffer = np.full((batch, heads, self.room, size), 0.5, np.float32)
            buffer[:, :, :slots] = live
            kept[name] = buffer.transpose(0, 2, 1, 3).reshape(batch, self.room, -1) if self.names.flat else buffer
        return kept


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session of a file, products by quantised weights in float32.

    The kernels else round activations to 8 bits, which makes a difference of one unit in the last place of a norm one
    of a percent: no tolerance would then tell an import that is right from one that is nearly right.

    Raises:
        SemkvError: when ONNX Runtime does not load it.
    """
    import onnx
    import onnxruntime

    graph = onnx.load(path, load_external_data=False)
    use_float32_activations(graph)
    # Buffers are shared by what is stated to be of one size, and onnxruntime-genai's builder (0.18) states wrong sizes
    # of repeated heads in float16. ONNX Runtime infers its own.
    del graph.graph.value_info[:]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*FLOAT32_BLOCKS)
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # whoever asks gets one sentence
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SemkvError("ONNX Runtime does not load it", where=path, got=reason) from error


def outputs(
    session: onnxruntime.InferenceSession, names: list[str], feeds: dict[str, Any], what: str
) -> list[NDArray[Any]]:
    """What a run gives.

    Raises:
        SemkvError: naming the run's inputs, when it fails.
    """
    try:
        found: list[NDArray[Any]] = session.run(names, feeds)
    except Exception as error:
        shapes = {name: list(array.shape) for name, array in feeds.items() if array.ndim <= 2}
        reason = " ".join(str(error).split())[:200]
        raise SemkvError(f"ONNX Runtime does not run {what}", where=f"inputs {shapes}", got=reason) from error
    return found

"""Saved sessions: the compressed cache and everything that belongs to it, in one safetensors file.

| tensor | shape | |
|---|---|---|
| position | `[B]` | tokens seen |
| length | `[groups,B]` | live slots |
| chunk | `[B,2]` | chunk number, and 1 after a delimiter |
| column.NAME.NN | `[B, 1 or heads, live]` | a slot column of group NN, as far as some row has live slots |
| buffer.NAME.NN | as the layout says, the slots cut alike | a buffer of group NN |
| behaviour.N.NAME | | what the contract's behaviour N keeps |

Metadata name the bundle by the SHA-256 of its manifest, the target, the budget, and the SHA-256 of all tensors.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.delimiters import ChunkCounter
from semkv_deploy.model.names import number_tag

if TYPE_CHECKING:
    from semkv_deploy.methods.layout import Buffer
    from semkv_deploy.runtime.session import Session
    from semkv_deploy.targets.engine import Array

FORMAT, VERSION = "semkv-session", "1"
"""Of the file's metadata."""


def save_session(session: Session, path: Path, row: int | None = None) -> None:
    """Writes the conversation of one row, or of all, to `path`, which appears when it is whole.

    Raises:
        SemkvError: when the file cannot be written, or a row is not in a state to go on from.
    """
    from safetensors.numpy import save

    rows = slice(None) if row is None else slice(row, row + 1)
    session.check_rows(row)
    tensors = _tensors(session, rows)
    metadata = {**_identity(session), "sha256": _digest(tensors)}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(save(tensors, metadata))
        os.replace(partial, path)
    except OSError as error:
        raise SemkvError(f"cannot be written: {error.strerror}", where=path, fix="give another path") from None
    finally:
        partial.unlink(missing_ok=True)


def load_session(session: Session, path: Path, row: int | None = None) -> None:
    """Takes over the conversation of a file, in one row or in all; what they held is gone.

    Raises:
        SemkvError: for a file that is missing, damaged, of another bundle, target, budget or number of rows; nothing is
            changed then.
    """
    if row is not None and not 0 <= row < session.batch:
        raise SemkvError("no such row", where="row", expected=f"0 to {session.batch - 1}", got=row)
    tensors = _read(path, _identity(session))
    batch = session.batch if row is None else 1
    rows = slice(None) if row is None else slice(row, row + 1)
    expected = _tensors(session, rows, content=False)
    position, length = tensors.get("position"), tensors.get("length")
    if position is None or position.shape != (batch,) or length is None or length.shape != (len(session.length), batch):
        raise SemkvError(
            "a session of another number of rows",
            where=path,
            expected=batch,
            got=0 if position is None else len(position),
        )
    capacity = np.array([group.capacity for group in session.contract.cache.groups])[:, None]
    if (length > capacity).any() and (length <= position).all():
        raise SemkvError(
            "the saved session holds more slots than the caches",
            where=path,
            expected=f"at most {int(capacity.min())}",
            got=int(length.max()),
            fix="compress it before it is saved",
        )
    fits = (length >= 0).all() and (length <= position).all()
    if not fits or (position < 0).any() or (position > session.max_context).any():
        raise SemkvError("the saved session does not fit the contract", where=path, fix="save it again")
    live = length.max(1, initial=0)
    whole_buffers = {f"buffer.{each.name}" for each in session.contract.cache.buffers if not each.has_slots}
    for name, array in expected.items():
        of_slots = name.startswith(("column.", "buffer.")) and name.rpartition(".")[0] not in whole_buffers
        group = int(name.rsplit(".", 1)[1]) if of_slots else None
        shape = array.shape if group is None else (*array.shape[:2], live[group], *array.shape[3:])
        found = tensors.get(name)
        if found is None or found.shape != tuple(shape) or found.dtype != array.dtype:
            raise SemkvError(
                f"the saved session's {name} is not the contract's",
                where=path,
                expected=f"{array.dtype} {list(map(int, shape))}",
                got="nothing" if found is None else f"{found.dtype} {list(found.shape)}",
            )
    session.reset(row)
    slots = session.slots
    slots.position[rows], slots.length[:, rows] = position, length
    for number, (chunk, after) in enumerate(tensors["chunk"].tolist(), rows.start or 0):
        slots.chunks[number] = ChunkCounter(chunk, bool(after))
    for group in range(len(live)):
        tag = number_tag(group, len(live))
        for name, columns in slots.columns.items():
            columns[group][rows, :, : live[group]] = tensors[f"column.{name}.{tag}"]
        for buffer in session.contract.cache.buffers:
            whole = np.array(session.engine.read(buffer.name, group))
            whole[rows][_live(buffer, live[group])] = tensors[f"buffer.{buffer.name}.{tag}"]
            session.engine.write(buffer.name, group, whole)
    for number, behaviour in enumerate(session.behaviours):
        prefix = f"behaviour.{number}."
        state = {name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)}
        behaviour.restore(state, rows)


def _identity(session: Session) -> dict[str, str]:
    """What a file must be of to be taken."""
    contract = session.contract
    return {
        "format": FORMAT,
        "version": VERSION,
        "bundle": session.engine.opened.fingerprint,
        "target": contract.target,
        "budget": repr(contract.budget),
    }


def _tensors(session: Session, rows: slice, *, content: bool = True) -> dict[str, Array]:
    """Everything of some rows; without content, in whole shapes, of buffers only one element a row."""
    slots, groups = session.slots, len(session.length)
    tensors: dict[str, Array] = {
        "position": slots.position[rows],
        "length": slots.length[:, rows],
        "chunk": np.array([[each.chunk, each.after_delimiter] for each in slots.chunks[rows]], np.int64),
    }
    for group, live in enumerate(slots.length[:, rows].max(1, initial=0)):
        tag = number_tag(group, groups)
        for name, columns in slots.columns.items():
            tensors[f"column.{name}.{tag}"] = columns[group][rows, :, : live if content else None]
        for buffer in session.contract.cache.buffers:
            array = session.engine.read(buffer.name, group)[rows]
            tensors[f"buffer.{buffer.name}.{tag}"] = array[_live(buffer, live)] if content else array
    for number, behaviour in enumerate(session.behaviours):
        tensors |= {f"behaviour.{number}.{name}": array for name, array in behaviour.state(rows).items()}
    return {name: np.ascontiguousarray(array) if content else array for name, array in tensors.items()}


def _live(buffer: Buffer, live: int) -> tuple[slice, ...]:
    """The part of a buffer that slots below `live` have."""
    return tuple(slice(0, int(live)) if size == "C" else slice(None) for size in buffer.shape.split(","))


def _digest(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _read(path: Path, identity: dict[str, str]) -> dict[str, Array]:
    """The tensors of a file of this bundle, target and budget."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SemkvError("no such file", where=path, expected="a file that Session.save wrote")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise SemkvError("not a saved session, or a damaged one", where=path, got=str(error).splitlines()[0]) from None
    called = {
        "format": "kind of file",
        "version": "version of the file",
        "bundle": "bundle",
        "target": "target",
        "budget": "budget",
    }
    for key, wanted in identity.items():
        if metadata.get(key) != wanted:
            raise SemkvError(
                f"the saved session is of another {called[key]}",
                where=path,
                expected=wanted[:16],
                got=str(metadata.get(key, "none"))[:16],
                fix="open the bundle and budget that it was saved from",
            )
    if metadata.get("sha256") != _digest(tensors):
        raise SemkvError(
            "the saved session is damaged", where=path, expected=f"SHA-256 {metadata.get('sha256', '')[:12]}…"
        )
    return tensors

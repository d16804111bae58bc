"""Saved sessions are one format: what one side saves the other goes on from, and what is damaged neither takes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from semkv_deploy import open_bundle, open_session
from semkv_deploy.runtime.state import _digest, read_note

from ..bundle.test_contract import words
from .driver import CppError, Driver
from .test_equality import converse, same_state

NAMES = [
    "semanticache, by head, at turns",
    "importance",
    "sonic",
    "dynsplit",
    "dynsplit, chosen of what stays",
    "dynsplit-select",
    "full",
]


@pytest.mark.parametrize("name", NAMES)
def test_saved_in_one_and_loaded_in_the_other(name: str, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Row 1 of two goes from Python to C++ and back; the sessions that saved go on beside, and are equal to it."""
    bundle = bundle_of(name)
    session = open_session(open_bundle(bundle), batch=2, threads=1)
    session.prefill([words(1, 150), words(2, 171)])
    session.save(tmp_path / "row", row=1, note="from Python")
    session.save(tmp_path / "all")
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        cpp.prefill([words(5, 40), words(6, 60)])
        cpp("load", path=str(tmp_path / "all"))
        same_state(session, cpp, tmp_path)
        cpp("load", path=str(tmp_path / "row"), row=0)
        assert cpp("stats", row=0) == {**cpp("stats", row=1), "compress_seconds": 0.0}
        cpp("load", path=str(tmp_path / "all"))
        converse(session, cpp, 4, tmp_path, turns=2)
        cpp("save", path=str(tmp_path / "back"), row=1, note="von hier: ü")
        other = open_session(open_bundle(bundle), batch=2, threads=1)
        assert read_note(other, tmp_path / "back") == "von hier: ü"
        other.load(tmp_path / "back", row=0)
        following = words(9, 70)
        ours = cpp.prefill([[], following])[1]
        np.testing.assert_array_equal(other.prefill([following, []])[0], ours)


def test_what_was_pinned_in_python_stays_in_cpp(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """A pinned slot is a score in the file: a compression at a turn's end leaves room for it."""
    bundle = bundle_of("importance, at turns")
    session = open_session(open_bundle(bundle), threads=1)
    session.prefill(words(1, 60))
    session.pin()
    session.save(tmp_path / "pinned")
    with Driver(driver) as cpp:
        cpp.open(bundle)
        cpp("load", path=str(tmp_path / "pinned"))
        converse(session, cpp, 2, tmp_path)
    assert (session.engine.read("slot_attention", 0) >= 2).sum() >= 60


def resaved(path: Path, **changes: Any) -> Path:
    """A saved session with other tensors or metadata, whose digest is right."""
    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, value in changes.pop("tensors", {}).items():
        tensors[name] = np.ascontiguousarray(value(tensors[name]))
    metadata = {**metadata, **changes, "sha256": _digest(tensors)}
    save_file(tensors, path.with_name("changed"), metadata)
    return path.with_name("changed")


def test_files_that_are_not_the_sessions_are_refused(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Each with its sentence, and the session is as it was."""
    bundle = bundle_of("semanticache")
    session = open_session(open_bundle(bundle), batch=2, threads=1)
    prompts = [words(1, 90), words(2, 30)]
    session.prefill(prompts)
    session.save(tmp_path / "saved")
    good = (tmp_path / "saved").read_bytes()
    column = "column.slot_position.00"
    cases: list[tuple[str, Path | bytes]] = [
        ("no such file (expected a file that semkv_session_save", tmp_path / "none"),
        ("not a saved session, or a damaged one", b"short"),
        ("not a saved session, or a damaged one", good[: len(good) // 2]),
        ("not a saved session, or a damaged one", (2**63).to_bytes(8, "little") + good[8:]),
        ("the saved session is damaged (expected SHA-256 ", good[:-1] + bytes([good[-1] ^ 1])),
        ("is of another bundle", resaved_bytes(tmp_path, bundle="0" * 64)),
        ("is of another target", resaved_bytes(tmp_path, target="tensorrt")),
        ("is of another budget (expected 0.5, got 0.25). Open", resaved_bytes(tmp_path, budget="0.25")),
        ("is of another version of the file", resaved_bytes(tmp_path, version="2")),
        (f"{column} is not the contract's", resaved_bytes(tmp_path, tensors={column: lambda a: a[:, :, :5]})),
        ("does not fit the contract", resaved_bytes(tmp_path, tensors={"position": lambda a: a * 0 + 9999})),
        ("does not fit the contract", resaved_bytes(tmp_path, tensors={"length": lambda a: a * 0 - 1})),
        ("holds more slots than the caches", resaved_bytes(tmp_path, tensors={
            "length": lambda a: a * 0 + 400, "position": lambda a: a * 0 + 500})),
    ]  # fmt: skip
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        cpp.prefill(prompts)
        for number, (sentence, content) in enumerate(cases):
            path = content if isinstance(content, Path) else tmp_path / str(number)
            if isinstance(content, bytes):
                path.write_bytes(content)
            with pytest.raises(CppError) as refusal:
                cpp("load", path=str(path))
            assert sentence in str(refusal.value) and refusal.value.code == 3, (sentence, str(refusal.value))
            assert str(path) in str(refusal.value)
        with pytest.raises(CppError, match=r"another number of rows \(expected 1, got 2\)"):
            cpp("load", path=str(tmp_path / "saved"), row=0)
        with pytest.raises(CppError, match="cannot be written: No such file or directory"):
            cpp("save", path=str(tmp_path / "nowhere" / "file"))
        same_state(session, cpp, tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def resaved_bytes(folder: Path, **changes: Any) -> bytes:
    return resaved(folder / "saved", **changes).read_bytes()


def test_a_file_that_no_session_wrote_does_no_harm(
    address_driver: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    """Numbers that index tables are cut to what they can be, under sanitizers: it goes on, or says why not."""
    for name in ("dynsplit", "dynsplit-select", "sonic", "importance"):
        bundle = bundle_of(name)
        session = open_session(open_bundle(bundle), threads=1)
        session.prefill(words(1, 150))
        session.save(tmp_path / "saved")
        with safe_open(str(tmp_path / "saved"), framework="numpy") as file:
            kept = [key for key in file.keys() if key.startswith(("behaviour.", "column.", "chunk"))]  # noqa: SIM118
        with Driver(address_driver) as cpp:
            cpp.open(bundle)
            for value in (-(2**63), -(2**62), 2**62, 2**63 - 1):
                changed = {key: lambda array, value=value: np.full_like(array, value) for key in kept}
                cpp("load", path=str(resaved(tmp_path / "saved", tensors=changed)))
                with contextlib.suppress(CppError):
                    cpp.prefill([words(2, 120)])
                    cpp("end_turn")
                    cpp.prefill([words(3, 50)])


def test_a_session_belongs_to_its_manifest(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """A saved session belongs to a bundle by the digest of its manifest, down to a space in it."""
    import shutil

    bundle = bundle_of("full")
    session = open_session(open_bundle(bundle), threads=1)
    session.prefill(words(1, 20))
    session.save(tmp_path / "saved")
    shutil.copytree(bundle, tmp_path / "other")
    manifest = tmp_path / "other" / "bundle.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())), encoding="utf-8")
    with Driver(driver) as cpp:
        cpp.open(tmp_path / "other")
        with pytest.raises(CppError, match="is of another bundle"):
            cpp("load", path=str(tmp_path / "saved"))

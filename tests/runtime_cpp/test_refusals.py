"""What libsemkv refuses, with the sentence that a user reads; and what a refused call leaves as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..bundle.test_contract import words
from .driver import CppError, Driver, onnxruntime_library

BAD_ARGUMENT, BAD_BUNDLE, ALTERED, NO_TARGET, CONTEXT_FULL, CACHE_FULL = 1, 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def cpp(driver: Path) -> Iterator[Driver]:
    with Driver(driver) as running:
        yield running


def refused(cpp: Driver, code: int, sentence: str, do: str, **arguments: Any) -> str:
    with pytest.raises(CppError) as refusal:
        cpp(do, **arguments)
    message = str(refusal.value)
    assert sentence in message and refusal.value.code == code, message
    return message


def test_calls(cpp: Driver, bundle_of: Callable[..., Path]):
    """A session of two rows, at 90 tokens: it is there yet after everything that is refused."""
    cpp.open(bundle_of("semanticache"), 2)
    prompts = [words(1, 90), words(2, 40)]
    cpp.prefill(prompts)
    for sentence, do, arguments in [
        ("prefill: wrong number of rows (expected 2 lists of tokens, got 1).", "prefill", {"rows": [[5]]}),
        ("prefill: nothing to prefill (expected at least one token, got none).", "prefill", {"rows": [[], []]}),
        ("prefill: no token of the model has this id (expected 0 to 511, got 512).", "prefill", {"rows": [[512], []]}),
        ("prefill: no token of the model has this id (expected 0 to 511, got -1).", "prefill", {"rows": [[], [-1]]}),
        ("step: no token of the model has this id", "step", {"ids": [5, 600]}),
        ("step: wrong number of rows (expected 2, got 3).", "step", {"ids": [5, 6, 7]}),
        ("row: no such row (expected 0 to 1, or -1 for all, got 2).", "end_turn", {"row": 2}),
        ("row: no such row", "reset", {"row": -2}),
        ("row: no such row", "save", {"row": 7, "path": "x"}),
        ("row: a wrong argument (expected 0 to 1, got 5).", "stats", {"row": 5}),
        ("temperature: out of range (expected 0 or more", "generate", {"rows": prompts, "temperature": -1}),
        ("top_p: out of range (expected 0 < top_p <= 1", "generate", {"rows": prompts, "top_p": 1.5}),
        ("top_k: out of range", "generate", {"rows": prompts, "top_k": -3}),
        ("max_new_tokens: a wrong argument", "generate", {"rows": prompts, "most": -1}),
    ]:
        refused(cpp, BAD_ARGUMENT, sentence, do, **arguments)
    full = "row 1: 480 more tokens do not fit the context (expected at most 512 tokens in all, got 40 + 480). Shorten"
    refused(cpp, CONTEXT_FULL, full, "prefill", rows=[[5], words(3, 480)])
    assert [cpp("stats", row=row)["position"] for row in (0, 1)] == [90, 40]


def test_a_cache_that_nothing_compresses(cpp: Driver, bundle_of: Callable[..., Path]):
    cpp.open(bundle_of("full", budgets=[0.25]))
    sentence = "prompt: the cache is full and the method does not compress (expected at most 128 tokens, got 0 + 129)"
    refused(cpp, CACHE_FULL, sentence, "prefill", rows=[words(1, 129)])
    # Generating ends there by itself.
    (reply,) = cpp("generate", rows=[words(1, 120)], most=50, stops=[])["replies"]
    assert len(reply) == 8 and cpp("stats", row=0)["kept_slots"] == 128


def test_what_a_bundle_is_opened_for(cpp: Driver, bundle_of: Callable[..., Path], tmp_path: Path):
    bundle = bundle_of("semanticache")
    library = onnxruntime_library()
    opened: dict[str, Any] = {"bundle": str(bundle), "onnxruntime": library}
    refused(cpp, BAD_BUNDLE, "no such bundle (expected a directory", "open", bundle=str(tmp_path / "none"))
    refused(cpp, BAD_BUNDLE, "not a bundle: it has no bundle.json. Give the directory", "open", bundle=str(tmp_path))
    refused(cpp, NO_TARGET, "target: this library does not run the target", "open", **opened, target="openvino")
    refused(cpp, NO_TARGET, "target: the bundle was not built for this target", "open", **opened, target="tensorrt")
    sentence = "budget: the target was not built for this budget (expected 0.5, got 0.3)."
    refused(cpp, BAD_ARGUMENT, sentence, "open", **opened, budget=0.3)
    refused(cpp, BAD_ARGUMENT, "batch: the graphs take another batch", "open", **opened, batch=-1)
    refused(cpp, BAD_ARGUMENT, "threads: a wrong argument", "open", **opened, threads=-1)
    sentence = "ONNX Runtime's library does not load (got /nowhere.so: cannot open shared object file"
    refused(cpp, NO_TARGET, sentence, "open", bundle=str(bundle), onnxruntime="/nowhere.so")
    refused(cpp, NO_TARGET, "it has no OrtGetApiBase", "open", bundle=str(bundle), onnxruntime="libm.so.6")


ALTERATIONS: dict[str, tuple[int, str, Callable[[Path], object]]] = {
    "truncated": (
        ALTERED,
        "file of the bundle is truncated or altered (expected ",
        lambda root: (weights(root)).write_bytes(weights(root).read_bytes()[:-1]),
    ),
    "altered": (ALTERED, "file of the bundle was altered (expected SHA-256 ", lambda root: flip(weights(root))),
    "missing": (ALTERED, "file of the bundle is missing", lambda root: (root / "delimiters.json").unlink()),
    "not listed": (ALTERED, "not in the bundle's list of files", lambda root: (root / "new").write_text("")),
    "a link": (ALTERED, "a link, where a bundle has files only", lambda root: linked(root / "delimiters.json")),
    "no JSON": (BAD_BUNDLE, "bundle.json: not valid JSON", lambda root: (root / "bundle.json").write_text("{")),
    "older": (
        BAD_BUNDLE,
        "bundle of another schema version (expected 5, got 4). Build it again",
        lambda root: rewritten(root, ["schema_version"], 4),
    ),
    "an unknown behaviour": (
        BAD_BUNDLE,
        "behaviours.0.kind is not what it should be (expected make_room or read_again",
        lambda root: rewritten(root, [*CONTRACT, "behaviours", 0, "kind"], "forget"),
    ),
    "an unknown field": (
        BAD_BUNDLE,
        "behaviours.0.hurry is a field that this version does not know",
        lambda root: rewritten(root, [*CONTRACT, "behaviours", 0, "hurry"], 1),
    ),
    "a capacity that is none": (
        BAD_BUNDLE,
        "cache.groups.1.capacity is not what it should be (expected an integer from 1 to 512",
        lambda root: rewritten(root, [*CONTRACT, "cache", "groups", 1, "capacity"], 10**9),
    ),
    "more kept than there is": (
        BAD_BUNDLE,
        "keep_slots contradicts the rest of the manifest",
        lambda root: rewritten(root, [*CONTRACT, "behaviours", 0, "keep_slots"], [256, 256]),
    ),
    "a path that leaves": (
        BAD_BUNDLE,
        "onnx contradicts the rest of the manifest (expected a path inside the bundle",
        lambda root: rewritten(root, [*CONTRACT, "programs", "decode", "graphs", 0, "onnx"], "../decoder.onnx"),
    ),
    "another input": (
        BAD_BUNDLE,
        "the graph has another input position_ids than the manifest says",
        lambda root: rewritten(root, [*CONTRACT, "programs", "decode", "graphs", 0, "inputs", 1, "shape"], [1, 1]),
    ),
    "an input that no host has": (
        BAD_BUNDLE,
        "programs contradicts the rest of the manifest (expected inputs of graph ",
        lambda root: appended(root, {"name": "mood", "dtype": "int64", "shape": [2]}),
    ),
    "another buffer": (
        BAD_BUNDLE,
        "contradicts the rest of the manifest (expected a tensor key_cache of the shape and type of buffer key, ",
        lambda root: rewritten(root, [*CONTRACT, "head_dim"], 8),
    ),
}
"""What is done to a bundle, and what is said of it."""

CONTRACT = ["targets", "onnxruntime-cpu", "budgets", 0, "contract"]


def weights(root: Path) -> Path:
    return max((root / "targets").rglob("*.data"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def linked(path: Path) -> None:
    moved = path.rename(path.parent.parent / path.name)
    path.symlink_to(moved)


def appended(root: Path, tensor: dict[str, Any]) -> None:
    place = [*CONTRACT, "programs", "decode", "graphs", 0, "inputs"]
    inside = json.loads((root / "bundle.json").read_text(encoding="utf-8"))
    for key in place:
        inside = inside[key]
    rewritten(root, place, [*inside, tensor])


def rewritten(root: Path, place: list[Any], value: Any) -> None:
    manifest = json.loads((root / "bundle.json").read_text(encoding="utf-8"))
    inside = manifest
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (root / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_bundles_that_are_not_what_was_built(
    alteration: str, cpp: Driver, bundle_of: Callable[..., Path], tmp_path: Path
):
    code, sentence, alter = ALTERATIONS[alteration]
    root = tmp_path / "bundle"
    shutil.copytree(bundle_of("semanticache"), root)
    options: dict[str, Any] = {"bundle": str(root), "onnxruntime": onnxruntime_library()}
    cpp("open", **options)
    alter(root)
    message = refused(cpp, code, sentence, "open", **options)
    assert str(tmp_path) in message or alteration == "another input"


def test_a_graph_that_names_weights_elsewhere(cpp: Driver, bundle_of: Callable[..., Path], tmp_path: Path):
    """Though its own digest is right: the manifest's author may be the one who lies."""
    import onnx

    root = tmp_path / "bundle"
    shutil.copytree(bundle_of("semanticache"), root)
    name = json.loads((root / "bundle.json").read_text())["targets"]["onnxruntime-cpu"]["budgets"][0]["contract"][
        "programs"
    ]["decode"]["graphs"][0]["onnx"]
    model = onnx.load(root / name, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../../../secret"
    onnx.save(model, root / name)
    content = (root / name).read_bytes()
    rewritten(root, ["files", name], {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    sentence = (
        "external data that the bundle does not list (expected files of the bundle beside the graph, got '../../../"
    )
    refused(cpp, BAD_BUNDLE, sentence, "open", bundle=str(root), onnxruntime=onnxruntime_library())


def test_what_is_not_run_is_verified_on_demand(cpp: Driver, bundle_of: Callable[..., Path], tmp_path: Path):
    root = tmp_path / "bundle"
    shutil.copytree(bundle_of("semanticache"), root)
    flip(next((root / "onnx").glob("*.onnx")))
    options: dict[str, Any] = {"bundle": str(root), "onnxruntime": onnxruntime_library()}
    cpp("open", **options)
    refused(cpp, ALTERED, "file of the bundle was altered", "open", **options, verify_all=True)


def test_native_operators_run_only_with_consent(
    cpp: Driver,
    bundle_of: Callable[..., Path],
    native_library: Path,
    tmp_path: Path,
):
    from semkv_deploy.targets.onnxruntime import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", native_library)
        bundle = bundle_of("streaming-llm", native="on")
    options: dict[str, Any] = {"bundle": str(bundle), "onnxruntime": onnxruntime_library()}
    sentence = "the bundle's graphs have native operators (expected libsemkv_onnxruntime.so of version 2, named by the"
    refused(cpp, NO_TARGET, sentence, "open", **options)
    digest = hashlib.sha256(native_library.read_bytes()).hexdigest()
    cpp("open", **options, native_library=str(native_library), native_sha256=digest)
    cpp.prefill([words(1, 20)])
    other = tmp_path / "other.so"
    other.write_bytes(native_library.read_bytes() + b"\n")
    sentence = f"not the native library that was asked for (expected SHA-256 {digest}"
    refused(cpp, ALTERED, sentence, "open", **options, native_library=str(other), native_sha256=digest)
    sentence = "another native library than the bundle's graphs need"
    refused(cpp, NO_TARGET, sentence, "open", **options, native_library="libm.so.6")
    sentence = "the native library does not load"
    refused(cpp, NO_TARGET, sentence, "open", **options, native_library=str(tmp_path / "none.so"))

"""Manifests whose values contradict each other or the graphs: a sentence before anything is allocated."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.open import open_bundle, open_session

Edit = Callable[..., None]
CONTRACT = "targets.onnxruntime-cpu.budgets.0.contract"


def put(raw: Any, path: str, value: Any) -> None:
    *way, last = path.split(".")
    for step in way:
        raw = raw[int(step) if isinstance(raw, list) else step]
    raw[int(last) if isinstance(raw, list) else last] = value


def refused(bundle: Path, moved: Path, path: str, value: Any, words: str) -> None:
    """A copy of a bundle with one value of its manifest changed does not open."""
    shutil.copytree(bundle, moved)
    raw = json.loads((moved / "bundle.json").read_text())
    put(raw, path, value)
    (moved / "bundle.json").write_text(json.dumps(raw))
    with pytest.raises(SemkvError, match=words):
        Bundle.open(moved)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.layers", 3, "windows"),
        ("model.layers", 10**9, "model.layers"),
        ("model.kv_heads", 3, "model"),
        ("model.kv_heads", 4, "kv_heads contradicts"),
        ("model.head_dim", 32, "head_dim contradicts"),
        ("model.vocab_size", 511, "vocab_size contradicts"),
        ("model.vocab_size", 10**12, "model.vocab_size"),
        ("model.dtype", "complex64", "model.dtype"),
        ("model.max_position", 100, "max_context contradicts"),
        ("max_context", 10**12, "max_context"),
        ("max_context", 0, "max_context"),
        (f"{CONTRACT}.budget", 1e308, "budget"),
        (f"{CONTRACT}.prefill_chunk", 0, "prefill_chunk"),
        (f"{CONTRACT}.prefill_chunk", 10**6, "keep_slots contradicts"),
        (f"{CONTRACT}.cache.groups.0.capacity", 2**40, "capacity"),
        (f"{CONTRACT}.cache.groups.0.capacity", -64, "capacity"),
        (f"{CONTRACT}.cache.groups.0.capacity", 1 << 20, "capacity contradicts .*at most 512 slots"),
        (f"{CONTRACT}.cache.groups.0.keep_slots", 128, "keep_slots contradicts"),
        (f"{CONTRACT}.cache.groups.1.layer", 0, "every KV head of every layer once"),
        (f"{CONTRACT}.cache.groups.1.heads", [0], "every KV head of every layer once"),
        (f"{CONTRACT}.cache.groups", [], "cache.groups"),
        (f"{CONTRACT}.cache.buffers.0.shape", "B,Hkv,C,99999999999", "buffer key contradicts"),
        (f"{CONTRACT}.cache.buffers.0.shape", "B,Q", "buffer key contradicts"),
        (f"{CONTRACT}.cache.buffers.0.name", "value", "key and value, each buffer once"),
        (f"{CONTRACT}.programs", {}, "a program decode"),
        (f"{CONTRACT}.programs.decode.graphs.0.groups", [0, 1, 7], "groups below 2"),
        (f"{CONTRACT}.programs.decode.graphs.0.groups", [0, 7], "a graph for every group"),
        (f"{CONTRACT}.programs.decode.buffers.key.input", "nothing.{group}", "none of that name"),
        (f"{CONTRACT}.programs.decode.graphs.0.inputs.0.name", "other", "other|none of that name"),
        (f"{CONTRACT}.programs.decode.graphs.0.inputs.0.shape", [1, 2], "the graph has another input"),
        (f"{CONTRACT}.programs.decode.graphs.0.aliases", {"a": "b"}, "another pair of aliases"),
        (f"{CONTRACT}.programs.decode.graphs.0.inputs.0.dtype", "", "dtype"),
        (f"{CONTRACT}.behaviours.0.program", "nothing", "program contradicts"),
        (f"{CONTRACT}.behaviours.0.reserve", 33, "at most 0 slots: room beside a prompt's piece"),
        (f"{CONTRACT}.behaviours.0.keep_slots", [1], "2 values, one a group"),
        (f"{CONTRACT}.behaviours.0.keep_slots", [96, 1000], "at most each group's capacity"),
        (f"{CONTRACT}.behaviours.0.by_group.thresholds", [[0.5], [0.5, 0.4]], "as many numbers for each group with"),
        (f"{CONTRACT}.behaviours.0.by_group.thresholds", [[float("nan")], [0.5]], "numbers of a sensible size"),
        ("method.kind", [], "unknown method"),
        ("method.kind", "lru", "unknown method .*expected importance or"),
        ("targets", {}, "targets"),
    ],
)
def test_contradictions_are_named(path: str, value: Any, words: str, moved: Path, edit: Edit):
    edit(lambda raw: put(raw, path, value))
    with pytest.raises(SemkvError, match=words):
        Bundle.open(moved)


READS, ROOM = f"{CONTRACT}.behaviours.0", f"{CONTRACT}.behaviours.1"


@pytest.mark.parametrize(
    "path, value, words",
    [
        (f"{READS}.program", "nothing", "program contradicts"),
        (f"{READS}.input", "nothing", "one of cache.step_inputs"),
        (f"{READS}.piece", 17, "at most 16 tokens"),
        (f"{READS}.piece", 9, "before one that makes room and keeps a reserve of its piece"),
        (f"{ROOM}.reserve", 0, "before one that makes room and keeps a reserve of its piece"),
        (f"{ROOM}.by_group.scored.0", 1, "by_group.scored contradicts .*expected float32"),
        (f"{ROOM}.by_group", {}, "a value of (scored|sinks) for group 0"),
        (f"{CONTRACT}.programs.compress.buffers.slot_attention.input", "x", "a value of slot_attention"),
        (f"{CONTRACT}.cache.step_inputs.0.shape", "B", "int64 of one dimension, or of B rows of one"),
        (f"{CONTRACT}.cache.step_inputs.0.dtype", "float32", "int64 of one dimension"),
        (f"{CONTRACT}.cache.step_inputs", [], "known by name|step_inputs"),
    ],
)
def test_contradictions_of_reading_again_are_named(
    path: str, value: Any, words: str, reading_bundle: Path, tmp_path: Path
):
    refused(reading_bundle, tmp_path / "moved", path, value, words)


TURNS = f"{CONTRACT}.behaviours.0"


@pytest.mark.parametrize(
    "path, value, words",
    [
        (f"{TURNS}.program", "nothing", "program contradicts"),
        (f"{TURNS}.decoder", "compress", "decoder contradicts .*expected decode"),
        (f"{TURNS}.first_id", 500, "first_id contradicts .*expected 512, the first id beyond the vocabulary"),
        (f"{TURNS}.most", 1 << 24, "a table of a sensible size"),
        (f"{TURNS}.tokens", 9, "at most 8 Nexus rows"),
        (f"{TURNS}.kept", 0, "kept"),
        (f"{TURNS}.keep_slots", [1], "2 values, at most each group's capacity"),
        (f"{TURNS}.keep_slots", [96, 1000], "2 values, at most each group's capacity"),
        (f"{CONTRACT}.cache.slot_columns.2.name", "slot_other", "slot_turn B,1,C"),
        (f"{CONTRACT}.programs.compress.buffers.key.input", "x", "none of that name|keep_index"),
    ],
)
def test_contradictions_of_turns_are_named(path: str, value: Any, words: str, turns_bundle: Path, tmp_path: Path):
    refused(turns_bundle, tmp_path / "moved", path, value, words)


BLOCKS = f"{CONTRACT}.behaviours.0"


@pytest.mark.parametrize(
    "path, value, words",
    [
        (f"{BLOCKS}.column", "nothing", "column contradicts .*one of cache.slot_columns beside"),
        (f"{BLOCKS}.column", "slot_position", "one of cache.slot_columns beside slot_position and slot_chunk"),
        (f"{BLOCKS}.search", 5, "search is at most a quarter of base"),
        (f"{BLOCKS}.base", 10**9, "base"),
        (f"{BLOCKS}.nearness", -1, "nearness"),
        (f"{BLOCKS}.turn_ids", [512], "turn_ids contradicts .*ids below 512"),
        (f"{BLOCKS}.token_ids.0", -1, "token_ids contradicts"),
        (f"{BLOCKS}.token_ids", [], "a weight and a log share for each token id"),
        (f"{BLOCKS}.domains.0.weights.0", 10**12, "domains, prose contradicts .*numbers of a sensible size"),
        (f"{BLOCKS}.domains.1.log_shares", [0], "a weight and a log share for each token id"),
        (f"{BLOCKS}.domain", 4, "domain is the number of a domain"),
        (f"{CONTRACT}.cache.slot_columns.2.name", "other", "column contradicts|a value of slot_block"),
    ],
)
def test_contradictions_of_blocks_are_named(path: str, value: Any, words: str, block_bundle: Path, tmp_path: Path):
    refused(block_bundle, tmp_path / "moved", path, value, words)


TABLES = f"{CONTRACT}.behaviours.0"


@pytest.mark.parametrize(
    "path, value, words",
    [
        (f"{TABLES}.program", "nothing", "program contradicts"),
        (f"{TABLES}.input", "nothing", r"input contradicts .*one of cache.step_inputs, B,13"),
        (f"{TABLES}.most", 12, r"most contradicts .*13 blocks or more"),
        (f"{TABLES}.most", 14, r"one of cache.step_inputs, B,14|14 rows, one a block"),
        (f"{TABLES}.most", 10**12, "most"),
        (f"{TABLES}.closed", 1, r"closed contradicts .*blocks or more"),
        (f"{TABLES}.base", 8, "blocks or more|search is at most a quarter"),
        (f"{TABLES}.turn_ids", [512], "turn_ids contradicts .*ids below 512"),
        (f"{CONTRACT}.cache.buffers.3.shape", "B,Hkv,14,2,D", "the graph has another|14|13 rows, one a block"),
        (f"{CONTRACT}.cache.step_inputs.0.shape", "B,13,2,2", "int64 of one dimension, or of B rows of one"),
        (f"{CONTRACT}.programs.map_blocks.buffers.key.input", "x", "a value of key_cache"),
    ],
)
def test_contradictions_of_tables_are_named(path: str, value: Any, words: str, table_bundle: Path, tmp_path: Path):
    refused(table_bundle, tmp_path / "moved", path, value, words)


def test_markup_and_control_characters_are_shown_as_they_are(moved: Path, edit: Edit):
    from click.testing import CliRunner

    from semkv_deploy.cli import main

    edit(lambda raw: raw["model"].update(source="x[/bold][red]\x1b[2J\u202e"))
    shown = CliRunner().invoke(main, ["inspect", str(moved)])
    assert shown.exit_code == 0, shown.output
    flat = shown.output.replace("\n", "")
    assert r"x[/bold][red]\x1b[2J\u202e" in flat.replace(" ", "") and "\x1b[2J" not in shown.output


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Paths of every value below a JSON document, the inner ones among them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if "." not in str(key):
            yield f"{path}{key}"
            yield from leaves(item, f"{path}{key}.")


NASTY: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", "x", "[/bold]", "\ud800",
    "../x", "\x00", [], {}, [[]], [0], {"": 0}, ["x"] * 3,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_no_value_of_a_manifest_gives_a_traceback(seed: int, moved: Path, edit: Edit):
    """Whatever one value is changed to, a bundle is refused in a sentence, or runs."""
    from semkv_deploy.cli.bundle_summary import summary

    path = moved / "bundle.json"
    text = path.read_text()
    places = [place for place in leaves(json.loads(text)) if not place.startswith("files")]
    rng = random.Random(seed)
    refused = 0
    for _ in range(40):
        raw = json.loads(text)
        place, value = rng.choice(places), rng.choice(NASTY)
        put(raw, place, value)
        path.write_text(json.dumps(raw))
        try:
            bundle = open_bundle(moved)
            summary(bundle)
            open_session(bundle, threads=1).prefill(list(range(2, 202)))
        except SemkvError as error:
            refused += 1
            assert str(error).endswith(".")
        except Exception as error:
            raise AssertionError(f"{place} = {value!r}") from error
    assert refused > 10

"""Every engine, on tiny models: at the same tokens they have the same positions in their caches and choose the same."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.bench.engines import open_engine
from semkv_deploy.bench.engines.base import Engine
from semkv_deploy.bench.engines.llama_servers import ProgramServer, ServerOptions
from semkv_deploy.bench.process import EngineProcess
from semkv_deploy.bench.subjects import Subject
from semkv_deploy.errors import SemkvError

from .conftest import needs_genai, needs_llama_cpp

CONTEXT = 200


def rows(batch: int, count: int, start: int = 0) -> list[list[int]]:
    return [[3 + (start + at * 7 + row * 5) % 250 for at in range(count)] for row in range(batch)]


def converse(engine: Engine, batch: int) -> list[dict[str, Any]]:
    """Two turns; the facts after each."""
    found = []
    for turn, prompt in enumerate((rows(batch, 60), rows(batch, 20, 11))):
        assert engine.prefill(prompt) > 0
        assert engine.decode(8) > 0
        assert engine.decode(4) > 0
        if turn == 0:
            engine.end_turn()
        found.append(engine.facts())
    return found


def chosen(engine: Any) -> list[int]:
    """The token that each row's reply would go on with."""
    return [int(token) for token in np.ravel(engine._next)]


@pytest.fixture(scope="module")
def of_bundle(tiny_bundle: Path) -> dict[str, Any]:
    return {"path": str(tiny_bundle), "target": "onnxruntime-cpu", "budget": 1.0, "allow_plugins": False}


@pytest.mark.parametrize("batch", [1, 2])
def test_transformers_caches_and_budget_1_go_on_alike(tiny_checkpoint: Path, of_bundle: dict[str, Any], batch: int):
    common = {"batch": batch, "threads": 1, "context": CONTEXT}
    ours = open_engine("bundle", {**of_bundle, **common})
    facts = converse(ours, batch)
    assert [each["live_slots"] for each in facts] == [72, 72 + 1 + 20 + 12]
    for cache in ("DynamicCache", "StaticCache"):
        peer = open_engine("transformers", {"path": str(tiny_checkpoint), "cache": cache, **common})
        theirs = converse(peer, batch)
        assert [each["live_slots"] for each in theirs] == [72, 105]
        assert chosen(peer) == chosen(ours)
        # Of key and value, 2 layers, 2 heads of 16, float32.
        slot_mib = batch * 2 * 2 * 2 * 16 * 4 / (1 << 20)
        held = CONTEXT if cache == "StaticCache" else 105
        assert theirs[1]["cache_mib"] == pytest.approx(held * slot_mib)
        assert facts[1]["read_mib"] == pytest.approx(105 * slot_mib)
        peer.reset()
        assert converse(peer, batch) == theirs


@needs_genai
def test_genai_goes_on_like_budget_1(tiny_genai: Path, of_bundle: dict[str, Any]):
    batch = 1
    common = {"batch": batch, "threads": 1, "context": CONTEXT}
    ours, peer = (
        open_engine("bundle", {**of_bundle, **common}),
        open_engine("genai", {"path": str(tiny_genai), **common}),
    )
    facts, theirs = converse(ours, batch), converse(peer, batch)
    assert [each["live_slots"] for each in theirs] == [72, 105]
    assert theirs[1]["read_mib"] == pytest.approx(facts[1]["read_mib"])
    last: Any = peer
    assert [int(last._generator.get_sequence(row)[-1]) for row in range(batch)] == chosen(ours)


@needs_genai
def test_genai_decodes_several_rows_of_one_turn(tiny_genai: Path, of_bundle: dict[str, Any]):
    common = {"batch": 2, "threads": 1, "context": CONTEXT}
    engines: list[Any] = [
        open_engine("bundle", {**of_bundle, **common}),
        open_engine("genai", {"path": str(tiny_genai), **common}),
    ]
    for engine in engines:
        engine.prefill(rows(2, 60))
        engine.decode(8)
    ours, peer = engines
    assert [int(peer._generator.get_sequence(row)[-1]) for row in range(2)] == chosen(ours)
    assert peer.facts()["cache_mib"] == pytest.approx(2 * (CONTEXT + 1) * 512 / (1 << 20))


@needs_genai
def test_genai_fills_the_context_that_its_model_has(tiny_genai: Path):
    engine = open_engine("genai", {"path": str(tiny_genai), "batch": 1, "threads": 1, "context": 512})
    engine.prefill(rows(1, 500))
    engine.decode(12)
    assert engine.facts()["live_slots"] == 512


@needs_genai
def test_genai_says_when_its_context_is_full(tiny_genai: Path):
    engine = open_engine("genai", {"path": str(tiny_genai), "batch": 1, "threads": 1, "context": 70})
    engine.prefill(rows(1, 60))
    engine.decode(10)
    with pytest.raises(SemkvError, match=r"takes no more tokens .*at most 71"):
        engine.decode(2)


@needs_llama_cpp
@pytest.mark.parametrize(("batch", "served"), [(1, "package"), (2, "package"), (1, "program"), (2, "program")])
def test_llama_cpp_goes_on_like_transformers(tiny_gguf: Path, llama_server: Path, batch: int, served: str):
    """In a process of its own, as it is measured: what the server leaves running ends with it."""
    program = str(llama_server) if served == "program" else None
    script = (
        "from tests.bench.test_engines import converse, chosen; from semkv_deploy.bench.engines import open_engine; "
        "import json, os\n"
        f"common = dict(path={str(tiny_gguf)!r}, batch={batch}, threads=1, context={CONTEXT})\n"
        f"llama = open_engine('llama_cpp', dict(cache='f32', program={program!r}, **common))\n"
        f"first = converse(llama, {batch}); token = chosen(llama); llama.reset(); again = converse(llama, {batch})\n"
        "peer = open_engine('transformers', dict(cache='DynamicCache', **common))\n"
        f"theirs = converse(peer, {batch})\n"
        "print(json.dumps([first, again, theirs, token, chosen(llama), chosen(peer)]), flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    first, again, theirs, *tokens = json.loads(done.stdout.strip().splitlines()[-1])
    assert [each["live_slots"] for each in first] == [72, 105]
    assert first == again and first[1]["read_mib"] == pytest.approx(theirs[1]["read_mib"])
    assert tokens[0] == tokens[1] == tokens[2]


@needs_llama_cpp
def test_a_llama_server_tells_of_itself_and_ends_with_its_worker(tiny_gguf: Path, llama_server: Path):
    options = {"path": str(tiny_gguf), "cache": "f16", "program": str(llama_server)}
    subject = Subject("llama.cpp f16", "llama_cpp", "f16", options)
    with EngineProcess(subject, threads=1, batch=1, context=CONTEXT) as it:
        about = it.ask("about")
        assert about["llama-server"] and about["llama.cpp"].startswith("CPU : ")
        assert it.ask("prefill", rows=rows(1, 40))["seconds"] > 0
        assert it.ask("facts")["process_mib"] > 1
        below = Path(f"/proc/{it._process.pid}/task/{it._process.pid}/children").read_text().split()
        assert below
    left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
    until = time.monotonic() + 5
    while left and time.monotonic() < until:
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
    assert not left


def test_a_llama_server_that_ends_is_told_with_its_last_words(tmp_path: Path):
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho no room for a cache >&2\nexit 1\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(SemkvError, match=r"x\.gguf, f16 cache: llama\.cpp does not load it: no room for a cache"):
        ProgramServer(program, ServerOptions("x.gguf", "f16", slots=1, context=8, threads=1))


def test_a_process_answers_and_says_what_its_memory_is(of_bundle: dict[str, Any]):
    subject = Subject("budget 1", "bundle", "float32", of_bundle, 1.0)
    with EngineProcess(subject, threads=1, batch=1, context=CONTEXT) as process:
        assert process.ask("prefill", rows=rows(1, 100))["seconds"] > 0
        assert process.ask("decode", count=4)["ms"] > 0
        facts = process.ask("facts")
        # The warm-up was forgotten.
        assert facts["live_slots"] == 104
        assert 0 < facts["peak_mib"] < facts["process_mib"]
        with pytest.raises(SemkvError, match=r"measurement of budget 1 failed: no token of the model has this id"):
            process.ask("prefill", rows=[[1 << 20]])
    assert process._process.poll() is not None


def test_a_process_that_dies_is_named_with_its_last_words(of_bundle: dict[str, Any]):
    subject = Subject("budget 1", "bundle", "float32", of_bundle, 1.0)
    with EngineProcess(subject, threads=1, batch=1, context=CONTEXT) as process:
        process._process.kill()
        with pytest.raises(SemkvError, match="measurement of budget 1 failed: the process ended with code -9"):
            process.ask("facts")


def test_an_engine_that_does_not_open_leaves_no_process(tmp_path: Path):
    options = {"path": str(tmp_path / "none"), "cache": "DynamicCache"}
    process = EngineProcess(Subject("x", "transformers", "float32", options), threads=1, batch=1, context=CONTEXT)
    with pytest.raises(SemkvError, match=r"none: measurement of x failed: no such checkpoint"), process:
        pass
    assert process._process.poll() is not None


def test_peers_are_imported_when_they_are_asked_for():
    """`semkv_deploy.bench` works without any of them."""
    script = (
        "import semkv_deploy.bench.report, semkv_deploy.bench.engines.transformers, sys; "
        "print([name for name in ('xllamacpp', 'onnxruntime_genai', 'transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

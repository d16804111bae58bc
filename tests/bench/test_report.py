"""What is printed and drawn of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from semkv_deploy.bench import plots, table
from semkv_deploy.bench.machine import machine_facts
from semkv_deploy.bench.plots import draw
from semkv_deploy.bench.statistics import ratios
from semkv_deploy.cli.main import main
from tests.cli.commands import cli, refused

from .conftest import cell


def output(cells: list[dict[str, Any]], turns: int = 1, **runtimes: str) -> dict[str, Any]:
    machine = {**machine_facts(), "simd": ["avx2", "avx512f"]}
    return {
        "bundles": ["b"], "tokens": 8, "turns": turns, "rounds": 3, "prefills": 1, "threads": 2,
        "machine": machine, "runtimes": runtimes, "cells": cells, "ratios": ratios(cells),
    }  # fmt: skip


def titles(cells: list[dict[str, Any]]) -> list[str]:
    return [title for title, _ in table.columns(cells)]


def test_columns_tell_something():
    assert "rows" not in titles([cell("budget 1", 1.0, [2.0])])
    assert {"rows", "tokens/s"} < set(titles([cell("budget 1", 1.0, [2.0]), cell("budget 1", 1.0, [3.0], batch=4)]))
    turns = [{"seen": seen, "ttft_s": 1.0, "tpot_ms": 1.0, "live_slots": 1.0} for seen in (512, 1024)]
    assert "all turns s" in titles([cell("budget 1", 1.0, [2.0], turns=turns)])


def test_the_table_has_medians_with_extremes_and_what_it_ran_on(capsys: pytest.CaptureFixture[str]):
    cells = [
        cell("budget 1", 1.0, [8.0, 8.5, 9.0], compress_s=0.0, ttft_compress_s=0.0),
        cell("budget 0.2", 0.2, [4.0, 2.0, 3.0], compress_s=0.6, ttft_compress_s=0.5),
        cell("llama.cpp f16", None, [6.0, 6.0, 6.0]),
    ]
    said = {"llama.cpp": "CPU : AVX2 = 1", "xllamacpp": "1"}
    table.show(output(cells, **said))
    text = " ".join(capsys.readouterr().out.split())
    assert "3.0 (2.0–4.0)" in text and "0.50 (25%)" in text
    assert "budget 1 ÷ budget 0.2" in text and "3.00 (2.00–4.25)" in text
    assert "threads of each: 2" in text and "avx2 avx512f" in text
    assert "llama.cpp was not compiled for this processor's AVX-512" in text
    assert "not compiled" not in " ".join(table.conditions(output(cells, **{"llama.cpp": "CPU : AVX512 = 1"})))


def test_machine_facts_name_the_processor_and_the_runtimes():
    facts = machine_facts()
    assert facts["cpu"] and 1 <= facts["usable_cores"] <= facts["cores"]
    assert facts["memory_bytes"] > 1 << 28 and facts["load"] >= 0
    assert facts["native_operators"].startswith("no no_library.so") or facts["native_operators"]
    assert {"semkv-deploy", "onnxruntime"} <= set(facts["versions"])
    json.dumps(facts)


def test_the_picture_has_a_panel_for_what_was_varied(tmp_path: Path):
    one = [cell("budget 1", 1.0, [8.0, 9.0]), cell("llama.cpp f16", None, [6.0, 7.0])]
    bars = ["time a token", "memory"]
    assert draw(output(one), tmp_path / "one.png") == bars
    more = [*one, cell("budget 1", 1.0, [9.0], context=2048), cell("budget 1", 1.0, [9.0], context=2048, batch=2)]
    assert draw(output(more), tmp_path / "more.png") == [
        *bars, "time a token by context", "first token by context", "throughput by batch",
    ]  # fmt: skip
    turns = [{"seen": seen, "ttft_s": 1.0, "tpot_ms": seen / 100, "live_slots": 1.0} for seen in (512, 1024)]
    talk = [cell("budget 1", 1.0, [8.0, 9.0], turns=turns), cell("budget 0.2", 0.2, [2.0, 2.0], turns=turns)]
    assert draw(output(talk, turns=2), tmp_path / "talk.png") == [*bars, "a conversation"]
    sizes = [(tmp_path / name).stat().st_size for name in ("one.png", "more.png", "talk.png")]
    assert all((tmp_path / name).read_bytes()[1:4] == b"PNG" for name in ("one.png", "more.png", "talk.png"))
    assert sizes[0] < sizes[2] < sizes[1]


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def said(path: Path) -> str:
        # The bundle is not there, and would be refused next.
        done = CliRunner().invoke(main, ["bench", str(tmp_path / "none"), "--plot", str(path)])
        assert done.exit_code == 1
        return done.output

    assert "no such bundle" in said(tmp_path / "a.png")
    assert "--plot: no such directory" in said(tmp_path / "missing" / "a.png")
    assert "one that ends with .png, .pdf, .svg" in said(tmp_path / "a.txt")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in said(tmp_path / "a.png")


def test_contexts_and_batches_in_one_run_and_a_bundle_that_is_named_twice(tiny_bundle: Path, tmp_path: Path):
    result = cli(
        "bench", tiny_bundle, tiny_bundle,
        "--budget", 0.25, "--budget", 1, "--context", 300, "--context", 400, "--batch", 1, "--batch", 2,
        "--tokens", 4, "--rounds", 2, "--prefills", 2, "--threads", 1, "--plot", tmp_path / "p.png", "--json",
    )  # fmt: skip
    measured = json.loads(result.stdout)
    assert measured["threads"] == 1 and measured["rounds"] == 2
    cells = {(each["name"], each["context"], each["batch"]): each for each in measured["cells"]}
    assert set(cells) == {
        (f"budget {budget}", context, batch) for budget in (1, 0.25) for context in (300, 400) for batch in (1, 2)
    }
    for (_, context, batch), each in cells.items():
        assert len(each["tpot_ms"]["all"]) == len(each["ttft_s"]["all"]) == 2
        assert each["live_slots"] == context if each["budget"] == 1 else each["live_slots"] <= 128
        assert each["cache_mib"] == pytest.approx(cells[each["name"], context, 1]["cache_mib"] * batch)
    assert (tmp_path / "p.png").is_file()
    assert "400 tokens, 2 rows: budget 0.25: 4 steps, round 2 of 2" in result.stderr


def test_a_model_of_another_shape_is_refused(tiny_bundle: Path, tmp_path: Path):
    from tests.tiny import tiny_bundle_at, tiny_checkpoint_at, tiny_export_at

    other = tiny_bundle_at(tiny_export_at(tiny_checkpoint_at(tmp_path / "c", 32), tmp_path / "e"), tmp_path / "b")
    done = CliRunner().invoke(main, ["bench", str(tiny_bundle), str(other)])
    assert done.exit_code == 1 and f"{other}: is of another model" in done.output


def test_a_context_too_small_for_what_is_decoded_is_refused(tiny_bundle: Path):
    done = cli("bench", tiny_bundle, "--context", 256, "--tokens", 100)
    refused(done, "--context", "expected 364 to 512 tokens", "got 256")


def test_genai_takes_turns_in_one_row_only(tiny_bundle: Path, tmp_path: Path):
    arguments = ["bench", str(tiny_bundle), "--turns", "3", "--batch", "2", "--tokens", "4", "--genai", str(tmp_path)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "--genai: takes further turns in one row only" in done.output

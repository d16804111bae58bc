"""The command line as a user meets it: in a process of its own, judged by what it prints and how it exits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from semkv_deploy.bundle import Bundle
from semkv_deploy.cli import bundle_summary
from semkv_deploy.cli.main import main

from .commands import cli, nothing_left, refused


def test_build_generate_inspect(tiny_export: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    built = cli("build", tiny_export / "decoder.onnx", "--budget", "0.5", "--max-context", 256, "-o", bundle)
    assert built.returncode == 0, built.stderr
    assert "0.5 (50 % compression)" in built.stdout and " 128 " in built.stdout and "int4 weights" in built.stdout
    shown = cli("inspect", bundle, "--json")
    manifest = json.loads(shown.stdout)
    assert manifest["max_context"] == 256 and manifest["method"]["kind"] == "importance"
    assert manifest["method"]["queries"] == "repeat" and manifest["method"]["fit"] == "all"
    assert manifest["targets"]["onnxruntime-cpu"]["weight_kl"] > 0
    said = cli("generate", bundle, "--prompt", "Hello", "--max-new-tokens", 5, "--stats")
    assert said.returncode == 0 and "tokens seen" in said.stderr
    raw = cli("generate", bundle, "--raw", "--prompt", "The weather", "--max-new-tokens", 5, "--threads", 1)
    assert raw.returncode == 0
    chat = cli("generate", bundle, "--max-new-tokens", 4, stdin="Hello\nAnd then?\n\n")
    assert chat.returncode == 0 and chat.stdout.count("you>") == 3


def test_bench(tiny_bundle: Path):
    result = cli("bench", tiny_bundle, "--context", 300, "--tokens", 8, "--json")
    output = json.loads(result.stdout)
    cells = {cell["name"]: cell for cell in output["cells"]}
    assert list(cells) == ["budget 1", "budget 0.5", "budget 0.25"]
    assert cells["budget 0.25"]["live_slots"] <= 128 < cells["budget 1"]["live_slots"] == 300
    whole = {(each["what"], each["under"]): each for each in output["ratios"] if each["over"] == "budget 1"}
    assert whole["tpot", "budget 0.25"]["median"] > 0 and len(whole["tpot", "budget 0.25"]["all"]) == 3
    assert not any(what == "all turns" for what, _ in whole)
    refused(cli("bench", tiny_bundle, "--context", 1000), "--context", "out of range")
    turns = cli(
        "bench", tiny_bundle, "--budget", 0.25, "--context", 400, "--tokens", 8, "--turns", 5, "--threads", 1, "--json"
    )
    (measured,) = json.loads(turns.stdout)["cells"]
    assert [turn["seen"] for turn in measured["turns"]] == [80, 160, 240, 320, 400]
    assert measured["total_s"] > sum(measured["ttft_s"]["all"])
    refused(cli("bench", tiny_bundle, "--tokens", 8, "--turns", 8), "--context", "expected 576 to 512 tokens")


def test_doctor_names_what_is_missing():
    found = json.loads(cli("doctor", "--json").stdout)
    here = found["targets"]["onnxruntime-cpu"]
    assert here["available"] is True and here["runnable"] is True
    for target in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda"):
        state = found["targets"][target]
        assert state["available"] == (state["missing"] is None)
        assert state["runnable"] == (state["missing_to_run"] is None)
    if found["machine"]["gpu"] is None:
        assert "GPU" in found["targets"]["tensorrt"]["missing"]
        assert not found["targets"]["tensorrt-rtx"]["runnable"]
    cuda = found["targets"]["onnxruntime-cuda"]
    assert cuda["available"] and cuda["notes"][0].startswith("native operators for CUDA: ")
    if found["machine"]["gpu"] is None:
        assert not cuda["runnable"] and "CUDAExecutionProvider" in cuda["missing_to_run"]
    shown = cli("doctor").stdout
    for name, state in found["targets"].items():
        assert name in shown and (state["missing"] or "") in shown


def test_missing_file(tmp_path: Path):
    refused(
        cli("build", tmp_path / "absent.onnx", "--budget", "0.5", "-o", tmp_path / "b"), "absent.onnx", "no such file"
    )
    nothing_left(tmp_path)


def test_missing_checkpoint(tmp_path: Path):
    refused(cli("export", tmp_path / "absent", "-o", tmp_path / "e"), "absent")
    nothing_left(tmp_path)


def test_not_an_onnx(tmp_path: Path):
    (tmp_path / "model.onnx").write_text("this is no model")
    (tmp_path / "out").mkdir()
    refused(cli("build", tmp_path / "model.onnx", "--budget", "0.5", "-o", tmp_path / "out" / "b"), "not an ONNX model")
    nothing_left(tmp_path / "out")


def test_onnx_without_semkv_operators(tmp_path: Path):
    import onnx.parser

    text = '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Neg (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    refused(cli("build", tmp_path / "model.onnx", "--budget", "0.5", "-o", tmp_path / "b"), "no cache to compress")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("budget, words", [("0", "out of range"), ("1.5", "out of range"), ("abc", "not a budget")])
def test_bad_budget(tiny_export: Path, tmp_path: Path, budget: str, words: str):
    result = cli("build", tiny_export / "decoder.onnx", "--budget", budget, "-o", tmp_path / "b")
    refused(result, "--budget", words, "0 < budget <= 1")
    nothing_left(tmp_path)


def test_budget_too_small_for_the_context(tiny_export: Path, tmp_path: Path):
    result = cli("build", tiny_export / "decoder.onnx", "--budget", "0.01", "-o", tmp_path / "b")
    refused(result, "too few to hold anything", "raise --budget".capitalize())
    nothing_left(tmp_path)


def test_context_beyond_the_model(tiny_export: Path, tmp_path: Path):
    result = cli(
        "build", tiny_export / "decoder.onnx", "--budget", "0.5", "--max-context", 100000, "-o", tmp_path / "b"
    )
    refused(result, "--max-context", "beyond the model's context", "1 to 512 tokens", "100000")
    nothing_left(tmp_path)


def test_truncated_external_data(tiny_export: Path, tmp_path: Path):
    broken = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    data = broken / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1000])
    (tmp_path / "out").mkdir()
    result = cli("build", broken / "decoder.onnx", "--budget", "0.5", "-o", tmp_path / "out" / "b")
    refused(result, "decoder.onnx.data", "truncated", "bytes")
    nothing_left(tmp_path / "out")


def test_altered_bundle_is_refused_by_generate(tiny_bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    path = copy / "targets/onnxruntime-cpu/decoder.onnx.data"
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    refused(cli("generate", copy, "--prompt", "x"), "decoder.onnx.data", "altered")


def test_unknown_target(tiny_export: Path, tmp_path: Path):
    result = cli("build", tiny_export / "decoder.onnx", "--budget", "0.5", "--target", "coreml", "-o", tmp_path / "b")
    refused(result, "unknown target", "onnxruntime-cpu", "coreml")
    nothing_left(tmp_path)


def test_target_that_is_not_available_here(tiny_export: Path, tmp_path: Path):
    result = cli("build", tiny_export / "decoder.onnx", "--budget", "0.5", "--target", "tensorrt", "-o", tmp_path / "b")
    if json.loads(cli("doctor", "--json").stdout)["targets"]["tensorrt"]["available"]:
        pytest.skip("target tensorrt is available on this machine")
    refused(result, "--target tensorrt", "not available on this machine", "GPU")
    nothing_left(tmp_path)


def test_prompt_longer_than_max_context(tiny_bundle: Path):
    refused(cli("generate", tiny_bundle, "--raw", "--prompt", "word " * 1000), "do not fit the context", "512")


def test_budget_that_was_not_built(tiny_bundle: Path):
    built = "0.25 (128tokens, 64KiB) or 0.5 (256tokens, 128KiB) or 1 (512tokens, 256KiB)"
    for budget in ("0.3", "100KiB", "200tokens"):
        result = cli("generate", tiny_bundle, "--budget", budget, "--prompt", "x")
        refused(result, "no such budget", built, f"got {budget}", f"--budget {budget}")


def test_budgets_in_slots_and_bytes(tiny_export: Path, tmp_path: Path):
    """Built, planned, validated, measured and run in the unit a user thinks in; what is built never exceeds it."""
    bundle, decoder = tmp_path / "bundle", tiny_export / "decoder.onnx"
    budgets = ["--budget", "200tokens", "--budget", "130KiB"]
    built = cli("build", decoder, *budgets, "--weights", "fp32", "-o", bundle)
    assert built.returncode == 0, built.stderr
    assert "0.375 (62 % compression)" in built.stdout and "0.5 (50 % compression)" in built.stdout
    contracts = [built.contract for built in Bundle.open(bundle).target("onnxruntime-cpu").budgets]
    assert [(each.budget, each.cache_bytes(1)) for each in contracts] == [(0.375, 192 << 9), (0.5, 256 << 9)]
    planned = json.loads(cli("plan", decoder, *budgets, "--json").stdout)
    assert [(row["budget"], row["capacity"]) for row in planned["rows"]] == [(0.375, 192), (0.5, 256)]
    said = cli("generate", bundle, "--budget", "130KiB", "--prompt", "Hello", "--max-new-tokens", 3, "--stats")
    assert "of 256 slots live" in said.stderr
    measured = cli("bench", bundle, "--budget", "200tokens", "--context", 300, "--tokens", 4, "--json")
    assert [cell["name"] for cell in json.loads(measured.stdout)["cells"]] == ["budget 0.375"]
    checked = cli("validate", bundle, "--budget", "128KiB", "--tokens", 60, "-o", tmp_path / "reports", "--json")
    assert {result["budget"] for result in json.loads(checked.stdout)["results"]} == {0.5}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("100tokens", ["100tokens of cache is a capacity of 64 slots", "expected at least 128tokens"]),
        ("50KiB", ["50KiB of cache is a capacity of 64 slots", "expected at least 64KiB"]),
        ("0tokens", ["out of range", "got 0tokens"]),
        ("1638", ["out of range", "1638tokens"]),
    ],
)
def test_budget_too_small_in_its_own_unit(budget: str, words: list[str], tiny_export: Path, tmp_path: Path):
    for command in (["build", "-o", tmp_path / "b"], ["plan"]):
        refused(cli(command[0], tiny_export / "decoder.onnx", "--budget", budget, *command[1:]), "--budget: ", *words)
    nothing_left(tmp_path)


def test_cache_groups(tiny_export: Path, tmp_path: Path):
    """One group a head, and layers of different sizes; planned and built alike, and never more than the budget."""
    decoder, groups = tiny_export / "decoder.onnx", tmp_path / "groups.json"
    shares = [{"layer": 0, "heads": [0, 1], "share": 1}, {"layer": 1, "heads": [0, 1], "share": 3}]
    groups.write_text(json.dumps(shares))
    for asked, capacities in (("head", [256] * 4), (groups, [128, 384])):
        bundle = tmp_path / f"bundle-{len(capacities)}"
        options = ["--budget", "0.5", "--cache-groups", asked]
        built = cli("build", decoder, *options, "--weights", "fp32", "-o", bundle)
        assert built.returncode == 0, built.stderr
        contract = Bundle.open(bundle).built("onnxruntime-cpu").contract
        assert [group.capacity for group in contract.cache.groups] == capacities
        (row,) = json.loads(cli("plan", decoder, *options, "--json").stdout)["rows"]
        assert row["capacity"] == max(capacities) and row["cache_bytes"] == contract.cache_bytes(1) == 256 << 9
    groups.write_text(json.dumps(shares[:1]))
    refused(cli("plan", decoder, "--budget", "0.5", "--cache-groups", groups), f"--cache-groups {groups}")


def test_unknown_method_option(tiny_export: Path, tmp_path: Path):
    result = cli(
        "build", tiny_export / "decoder.onnx", "--budget", "0.5", "--method-option", "colour=red", "-o", tmp_path / "b"
    )
    refused(result, "importance does not take colour", "queries")
    nothing_left(tmp_path)


def test_existing_output_is_not_overwritten(tiny_export: Path, tiny_bundle: Path):
    before = (tiny_bundle / "bundle.json").read_bytes()
    result = cli("build", tiny_export / "decoder.onnx", "--budget", "0.5", "-o", tiny_bundle)
    refused(result, "already exists", "--force")
    assert (tiny_bundle / "bundle.json").read_bytes() == before


def test_debug_shows_the_traceback(tmp_path: Path):
    result = cli("--debug", "build", tmp_path / "absent.onnx", "--budget", "0.5", "-o", tmp_path / "b")
    assert result.returncode != 0 and "Traceback" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, number: signal.Signals):
    """The signal comes while the bundle is half written."""
    command = [sys.executable, "-m", "semkv_deploy.cli", "build", str(tiny_checkpoint), "--budget", "0.5"]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "b")],
        stderr=subprocess.PIPE,
        text=True,
        # A background job ignores interrupts, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted: nothing was written" in stderr and "Traceback" not in stderr
    nothing_left(tmp_path)


def test_interrupt_after_the_bundle_is_in_place_says_so(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The signal comes while the summary is printed."""

    def interrupted(bundle: Bundle) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_summary, "summary", interrupted)
    words = ["build", str(tiny_export / "decoder.onnx"), "--budget", "0.5", "--weights", "fp32"]
    words += ["--max-context", "256", "--method", "streaming-llm", "-o", str(tmp_path / "b")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 130
    assert f"interrupted: {tmp_path / 'b'} was already written" in result.stderr
    assert "nothing was written" not in result.stderr
    Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("command", ["build", "plan"])
@pytest.mark.parametrize("dtype, words", [("int8", "takes no 8-bit cache"), ("float15", "unknown element type")])
def test_unknown_element_type(command: str, dtype: str, words: str, tiny_export: Path, tmp_path: Path):
    output = ["-o", tmp_path / "b"] if command == "build" else []
    options = ["--budget", "0.5", "--target", "tensorrt-rtx", "--dtype", dtype, *output]
    result = cli(command, tiny_export / "decoder.onnx", *options)
    refused(result, "--dtype", words, "expected float16, bfloat16 or float32", f"got {dtype}")
    assert result.returncode == 1
    nothing_left(tmp_path)


def test_compute_capability_is_checked_without_engines(tiny_export: Path, tmp_path: Path):
    options = ["--budget", "0.5", "--target", "tensorrt-rtx", "--no-engines", "--compute-capability", "90"]
    refused(
        cli("build", tiny_export / "decoder.onnx", *options, "-o", tmp_path / "b"), "--compute-capability", "Hopper"
    )
    nothing_left(tmp_path)


def test_calibration_text_that_is_no_utf_8(tiny_export: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_bytes("Frühling".encode("latin-1"))
    options = ["--budget", "0.5", "--calibration-text", text, "-o", tmp_path / "b"]
    result = cli("build", tiny_export / "decoder.onnx", *options)
    refused(result, f"--calibration-text {text}: not UTF-8 text (got byte 0xfc at offset 2)")


def test_engine_cache_that_is_a_file(tiny_export: Path, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx_bindings")
    (tmp_path / "cache").touch()
    (tmp_path / "out").mkdir()
    options = ["--budget", "0.5", "--target", "tensorrt-rtx", "--engine-cache", tmp_path / "cache"]
    result = cli("build", tiny_export / "decoder.onnx", *options, "-o", tmp_path / "out" / "b")
    refused(result, f"--engine-cache {tmp_path / 'cache'}: cannot be a folder of engines: File exists")
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    "error, line",
    [
        (PermissionError(13, "Permission denied", "reports"), "error: reports: Permission denied"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
    ],
)
def test_error_of_the_system_is_one_sentence(error: OSError, line: str, monkeypatch: pytest.MonkeyPatch):
    from click.testing import CliRunner

    from semkv_deploy.cli import doctor

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "report", fail)
    result = CliRunner().invoke(main, ["doctor"])
    assert (result.exit_code, result.output.strip()) == (1, line)
    assert CliRunner().invoke(main, ["--debug", "doctor"]).exception is error

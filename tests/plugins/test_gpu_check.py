"""scripts/gpu_check.sh where there is no GPU, where tools are missing, and with fakes of all it calls; its Python part
in miniature on the emulated kernels, with torch.cuda faked (gpu_check_worker.py)."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "plugins" / "gpu_check"))

import block_cases  # noqa: E402
import compaction_cases  # noqa: E402
import decode_times  # noqa: E402
import nexus_cases  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402
import verdict  # noqa: E402


def gpu_check(
    root: Path, python: str, *arguments: str, path: str = "/usr/bin:/bin"
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "PYTHON": python, "XDG_CACHE_HOME": str(root / "no-headers")}
    command = [str(root / "scripts" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = gpu_check(ROOT, sys.executable, "--json", str(result))
    assert done.returncode == 0, done.stderr
    assert "no GPU: skipped" in done.stdout
    assert json.loads(result.read_text()) == {"skipped": "no GPU"}


def test_without_torch_it_fails_and_leaves_no_old_result(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text('{"verdict": "passed"}')
    bare = executable(tmp_path / "python", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    done = gpu_check(ROOT, str(bare), "--json", str(result))
    assert done.returncode == 1
    assert "no numpy" in done.stderr and "install torch and numpy" in done.stderr
    assert json.loads(result.read_text())["verdict"] == "failed"


def check(library: Path, result: Path, mode: str) -> subprocess.CompletedProcess[str]:
    libasan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    script = Path(__file__).with_name("gpu_check_worker.py")
    arguments = ["--library", str(library), "--dry-run", "--json", str(result), mode]
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": libasan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
        timeout=300,
    )


def test_dry_run_fills_every_field(emulated_kernels: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = check(emulated_kernels, result, "whole")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["finished"] and found["failures"] == [] and found["not_measured"] == []
    assert found["sweep"]["cases"] == found["sweep"]["planned"] >= 20
    assert set(found["sweep"]["by_operator"]) == set(sweep.COUNTS) and all(found["sweep"]["by_operator"].values())
    assert len(found["large"]) == 6 and all(row["failures"] == [] for row in found["large"])
    assert found["copy_gb_s"] == max(found["copies_gb_s"].values()) > 0
    assert len(found["decode"]) == len(decode_times.SMALL_CASES)
    for row, kept in itertools.product(found["decode"], ("1", "0.5", "0.2")):
        assert row[f"share_{kept}"] == pytest.approx(row[f"floor_ms_{kept}"] / row[f"ms_{kept}"])
        assert row[f"relative_error_{kept}"] < 2e-3
        assert row["ms_flash"] > 0 and row["ms_flashinfer"] > 0 and row["copies"] > 1
    kernels = found["kernels"]
    assert len(kernels) == 4 + 6
    for values in kernels.values():
        assert values["bytes"] > 0 and values["share"] == pytest.approx(values["floor_ms"] / values["ms"])
    cluster = kernels["SemanticCluster 192 slots"]
    assert 0 < cluster["length"] < 192 and cluster["level"] >= 1 and cluster["share_of_prefill"] > 0
    for words in ("copy bandwidth", "share_of_prefill", "speedup_0.2", "NexusAttention indexed 0.2 int8", "floor_ms"):
        assert words in done.stdout


def test_one_broken_case_and_a_nan_leave_the_rest(emulated_kernels: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = check(emulated_kernels, result, "broken")
    assert done.returncode == 1, done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["finished"] and len(found["failures"]) == 1 and "broken on purpose" in found["failures"][0]
    assert "broken on purpose" in found["decode"][0]["failed"]
    assert found["decode"][1]["ms_flash"] == "nan" and found["decode"][1]["ms_1"] > 0
    assert len(found["kernels"]) == 10
    assert "ValueError: broken on purpose" in done.stdout


def test_time_and_memory_that_do_not_suffice_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = report.Report(tmp_path / "late.json", seconds=-1)
    assert late.attempt("case", dict) == {"not_measured": "NotMeasured: time limit"}
    assert json.loads((tmp_path / "late.json").read_text())["not_measured"] == ["case: NotMeasured: time limit"]
    monkeypatch.setattr(decode_times.timing, "free_bytes", lambda device: 1 << 30)
    case = decode_times.Decode((32, 8, 128), 64, 131_072)
    assert case.cache_bytes() == 32 << 30
    in_time = report.Report(None, seconds=60)
    row = in_time.attempt("big", lambda: {"caches": decode_times.cache_copies(case, torch.device("cpu"))})
    assert "needs 32768 MiB, free are 1024" in row["not_measured"] and in_time.data["failures"] == []

    def wrong() -> dict[str, Any]:
        return {"failures": ["not equal"]}

    in_time.attempt("wrong", wrong)
    assert in_time.data["failures"] == ["wrong: not equal"]


def test_the_whole_run_meets_every_combination() -> None:
    """Type x head size x group, type x head size x set of options, and type x head size of the others."""
    seeds = {name: sweep.seeds(name, count) for name, count in sweep.COUNTS.items()}
    assert all(len(set(chosen)) == len(chosen) for chosen in seeds.values())
    plain, optional = set(), set()
    for seed in seeds["NexusAttention"]:
        query, key = nexus_cases.case(seed)[0][:2]
        plain.add((query.dtype, query.shape[-1], query.shape[1] // key.shape[1]))
    assert len(plain) == 3 * 5 * 8
    for seed in seeds["NexusAttention with options"]:
        inputs, options, attributes = nexus_cases.option_case(seed)
        chosen = (*sorted(options), inputs[3].dtype if "key_scale" in options else None, attributes["mass"])
        optional.add((inputs[0].dtype, inputs[0].shape[-1], chosen))
    assert len(optional) == 3 * 5 * len(nexus_cases.OPTIONS)
    inputs_of: dict[str, Any] = {
        "CompactCache": compaction_cases.compact_case,
        "SemanticCluster": lambda seed: compaction_cases.cluster_case(seed)[0],
        "SemanticBlockMap": lambda seed: block_cases.map_case(seed)[0],
        "SemanticBlockSelect": lambda seed: block_cases.select_case(seed)[0],
    }
    for name, make in inputs_of.items():
        met = {(first.dtype, first.shape[-1]) for first in (make(seed)[0] for seed in seeds[name])}
        head_sizes = block_cases.HEAD_SIZES if "Block" in name else nexus_cases.HEAD_SIZES
        assert met == set(itertools.product(nexus_cases.DTYPES, head_sizes)), name


def test_the_sanitizers_share_meets_every_type_head_size_and_option() -> None:
    chosen = [seed for name, seed in sweep.order(0.3) if name == "NexusAttention with options"]
    cases = [nexus_cases.option_case(seed) for seed in chosen]
    assert {case[0][0].dtype for case in cases} == set(nexus_cases.DTYPES)
    assert {case[0][0].shape[-1] for case in cases} == set(nexus_cases.HEAD_SIZES)
    assert {seed % len(nexus_cases.OPTIONS) for seed in chosen} == set(range(len(nexus_cases.OPTIONS)))
    # Cut off after a fifth of it, too.
    assert {name for name, _ in sweep.order(0.3)[: len(sweep.order(0.3)) // 5]} == set(sweep.COUNTS)


def test_timed_cases_are_the_issues() -> None:
    sizes = {(1024, 8192, 32_768, 131_072)[i] for i in range(4)}
    for heads in (*decode_times.MAIN_HEADS, *decode_times.MORE_HEADS):
        met = [(case.batch, case.slots) for case in decode_times.CASES if case.heads == heads]
        assert sorted(met) == sorted(itertools.product((1, 8, 64), sizes))


CLEAN = {
    "check": "0",
    "memcheck": "clean: 9 of 9 cases",
    "racecheck": "clean: 9 of 9 cases",
    "api_harness": "passed: 40",
    "onnxruntime": "passed: 220 cases",
}


@pytest.mark.parametrize(
    ("facts", "failures", "expected"),
    [
        ({}, [], "passed"),
        ({"racecheck": "not run: device not supported here"}, [], "passed"),
        ({"api_harness": "not run: no TensorRT headers"}, [], "passed"),
        ({"onnxruntime": "not run: no ONNX Runtime headers"}, [], "passed"),
        ({"onnxruntime": "failed: see onnxruntime.log"}, [], "failed"),
        ({"memcheck": "unknown: not finished in 80 s"}, [], "incomplete"),
        ({"check": "3"}, [], "incomplete"),
        ({"memcheck": "failed: errors"}, [], "failed"),
        ({"check": "124"}, [], "failed"),
        ({}, ["NexusAttention seed 3"], "failed"),
    ],
)
def test_verdict(facts: dict[str, str], failures: list[str], expected: str) -> None:
    assert verdict.verdict({"failures": failures}, CLEAN | facts) == expected


FAKE_PYTHON = """#!{python}
# A Python with a GPU: check.py leaves a small report; a run under the sanitizer ends as the file `code` says.
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
if sys.argv[1] == "-c" and "onnxruntime" in sys.argv[2]:
    sys.exit(0 if (here / "onnxruntime").exists() else 1)
elif sys.argv[1] == "-c":
    print("90")
elif sys.argv[1].endswith("onnxruntime_check.py"):
    print("220 cases in ONNX Runtime on cuda, 0 failed")
elif sys.argv[1].endswith("check.py"):
    print("sweep: 7 of 9 cases, 0 failures")
    with (here / "calls").open("a") as calls:
        print(os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "-"), *sys.argv, file=calls)
    if "--json" in sys.argv:
        report = dict(finished=True, failures=[], not_measured=[])
        pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(report))
    else:
        sys.exit(int((here / "code").read_text()))
else:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
"""
FAKE_BUILD = """#!/bin/sh
# The headers are there if the file `headers` is; the harness is a script that passes.
here="$(dirname "$0")/.."
case "$*" in
  *--print-headers*) [ -f "$here/headers" ] && echo /headers; exit ;;
  *semkv_api_harness*) printf '#!/bin/sh\\necho 40 tests passed\\n' >"$here/out/semkv_api_harness"
    chmod +x "$here/out/semkv_api_harness" ;;
  *) mkdir -p "$here/out" ;;
esac
"""
FAKE_SANITIZER = """#!/bin/sh
# Runs what it is given to watch.
[ "$1" = --help ] && echo '--report-api-errors --kernel-regex' && exit
while [ "${1%python}" = "$1" ]; do shift; done
exec "$@"
"""


@pytest.mark.parametrize(
    ("code", "headers", "expected", "memcheck"),
    [
        (0, True, "passed", "clean: 7 of 9 cases"),
        (3, False, "incomplete", "unknown: clean so far, 7 of 9 cases in"),
        (9, False, "failed", "failed: errors, see memcheck.log"),
        (124, False, "incomplete", "unknown: not finished in"),
    ],
)
def test_the_script_from_end_to_end(tmp_path: Path, code: int, headers: bool, expected: str, memcheck: str) -> None:
    for folder in ("scripts", "bin", "plugins"):
        (tmp_path / folder).mkdir()
    (tmp_path / "plugins" / "gpu_check").symlink_to(ROOT / "plugins" / "gpu_check")
    shutil.copy(ROOT / "scripts" / "gpu_check.sh", tmp_path / "scripts")
    executable(tmp_path / "scripts" / "build_plugins.sh", FAKE_BUILD)
    executable(tmp_path / "scripts" / "build_native.sh", "#!/bin/sh\n")
    python = executable(tmp_path / "bin" / "python", FAKE_PYTHON.format(python=sys.executable))
    executable(tmp_path / "bin" / "compute-sanitizer", FAKE_SANITIZER)
    (tmp_path / "bin" / "code").write_text(str(code))
    if headers:
        (tmp_path / "headers").touch()
        (tmp_path / "bin" / "onnxruntime").touch()
    arguments = ("--json", str(tmp_path / "result.json"), "--out", str(tmp_path / "out"), "--seconds", "300")
    done = gpu_check(tmp_path, str(python), *arguments, path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["verdict"] == expected, done.stdout + done.stderr
    assert done.returncode == verdict.STATUS[expected]
    assert f"gpu_check: {expected}" in done.stdout
    assert found["compute_sanitizer"]["memcheck"].startswith(memcheck)
    assert found["compute_sanitizer"]["racecheck"].endswith("(shared memory only)")
    assert found["api_harness"] == ("passed: 40 tests passed" if headers else "not run: no TensorRT headers")
    ran = "passed: 220 cases in ONNX Runtime on cuda, 0 failed"
    assert found["onnxruntime"] == (ran if headers else "not run: no onnx and onnxruntime-gpu in this Python")
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert [call[0] for call in calls] == ["-", "1", "1"], "only the sanitizers' runs do without torch's allocator"

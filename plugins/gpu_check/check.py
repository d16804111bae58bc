"""Checks and times the kernels on this machine's GPU: torch and numpy, one library built by nvcc, no TensorRT.

    python plugins/gpu_check/check.py --library build/plugins-gpu/libsemkv_kernels.so --json result.json

Started by scripts/gpu_check.sh. The JSON is rewritten after every case, so that whatever ends the run leaves what was
found. `--sweep-only SHARE` runs that share of the small correctness cases and nothing else (for compute-sanitizer);
`--dry-run` runs everything in miniature on a CPU with the emulated library.

Exit status: 0, or 1 if anything failed, or 3 if nothing did but correctness cases were left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bindings  # noqa: E402
import decode_times  # noqa: E402
import flashinfer_times  # noqa: E402
import large_cases  # noqa: E402
import layer_times  # noqa: E402
import option_times  # noqa: E402
import sweep  # noqa: E402
import table  # noqa: E402
import timing  # noqa: E402
from report import NotMeasured, Report  # noqa: E402

FAILED, INCOMPLETE = 1, 3


def run_sweep(report: Report, kernels: bindings.Kernels, device: torch.device, share: float) -> None:
    """The small correctness cases, into report.data["sweep"]."""
    result = report.attempt("sweep", partial(sweep.sweep, kernels, device, share, report))
    report.data["sweep"] = result
    done, planned = result.get("cases", 0), result.get("planned", 0)
    print(f"sweep: {done} of {planned} cases, {len(result.get('failures', []))} failures", flush=True)
    if done < planned:
        report.skip("sweep", f"{planned - done} of {planned} cases: {report.stopped()}")


def run_large(report: Report, kernels: bindings.Kernels, device: torch.device, small: bool, slots: int) -> None:
    """The large correctness cases, into report.data["large"]."""
    rows = report.data["large"] = []

    def attention(case: large_cases.Attention) -> dict[str, Any]:
        if not large_cases.enough_memory(case, device):
            raise NotMeasured(f"needs {large_cases.needs(case) >> 20} MiB of free memory")
        return large_cases.attention(kernels, device, case)

    for case in large_cases.SMALL_ATTENTION if small else large_cases.ATTENTION:
        rows.append({"case": case.name()} | report.attempt(case.name(), partial(attention, case)))
    for name, run in (
        ("SemanticCluster", large_cases.cluster),
        ("CompactCache", large_cases.compact),
        ("SemanticBlockMap", large_cases.block_map),
    ):
        name = f"{name} {slots} slots"
        rows.append({"case": name} | report.attempt(name, partial(run, kernels, device, slots)))
    good = sum(not row.get("failures", ["not run"]) for row in rows)
    print(f"large: {good} of {len(rows)} cases equal float32", flush=True)


def run_times(report: Report, kernels: bindings.Kernels, device: torch.device, small: bool, slots: int) -> None:
    """Copy bandwidth, the main decode steps, the other kernels, the other decode steps, flashinfer: in this order."""
    data = report.data
    data["copies_gb_s"] = report.attempt("copy bandwidth", partial(timing.copy_bandwidth, device))
    measured = [v for v in data["copies_gb_s"].values() if isinstance(v, float)]
    gb_s = data["copy_gb_s"] = max(measured, default=float("nan"))
    data["decode"], data["kernels"] = rows, kernels_rows = [], {}
    cases = decode_times.SMALL_CASES if small else decode_times.CASES

    def decode(case: decode_times.Decode) -> None:
        name = " ".join(("decode", *(str(v) for v in case.facts().values())))
        result = report.attempt(name, partial(decode_times.decode, kernels, device, case, gb_s))
        rows.append(case.facts() | result)

    first = len(cases) // 4
    for case in cases[:first]:
        decode(case)
    for name, times in layer_times.TIMES.items():
        kernels_rows[f"{name} {slots} slots"] = report.attempt(name, partial(times, kernels, device, slots, gb_s))
    for variant in option_times.VARIANTS:
        name = f"NexusAttention {variant}"
        kernels_rows[name] = report.attempt(
            name, partial(option_times.option_times, kernels, device, slots, gb_s, variant)
        )
    for case in cases[first:]:
        decode(case)
    for case, row in zip(cases, rows, strict=True):
        if "ms_1" in row:
            row["ms_flashinfer"], row["flashinfer_error"] = None, report.stopped() or flashinfer_times.missing()
            if not row["flashinfer_error"]:
                row |= decode_times.flashinfer(device, case)
                report.save()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=330.0, help="no case starts later than this")
    parser.add_argument("--sweep-only", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    small = options.dry_run
    device = torch.device("cpu" if small else "cuda")
    report = Report(options.json, options.seconds)
    report.data |= {
        "device": "none: dry run on a CPU" if small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": "float16",
    }
    report.save()
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        kernels = bindings.Kernels(options.library)
        run_sweep(report, kernels, device, options.sweep_only or (0.06 if small else 1.0))
        if not options.sweep_only:
            slots = 192 if small else 32_768
            run_large(report, kernels, device, small, slots)
            run_times(report, kernels, device, small, slots)
            print(table.table(report.data), flush=True)
        report.data["finished"] = True
    except BaseException as error:
        report.fail(f"check.py ended early: {type(error).__name__}: {error}")
        raise
    finally:
        report.save()
    for skipped in report.data["not_measured"]:
        print(f"not measured: {skipped}")
    if report.data["failures"]:
        return FAILED
    left_out = report.data["sweep"].get("cases") != report.data["sweep"].get("planned")
    left_out = left_out or any("not_measured" in row for row in report.data.get("large", []))
    return INCOMPLETE if left_out else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # What a lost CUDA context does while Python ends must not change the status.
    os._exit(status)

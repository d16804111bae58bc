"""Completes the JSON of check.py with what scripts/gpu_check.sh found, and gives the verdict on the whole run.

    python verdict.py FILE SECONDS check=EXIT_STATUS memcheck=TEXT racecheck=TEXT api_harness=TEXT onnxruntime=TEXT

Exit status: 0 passed, 1 failed, 3 incomplete: nothing failed, but correctness is not known for all that was planned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STATUS = {"passed": 0, "failed": 1, "incomplete": 3}


def verdict(report: dict[str, Any], facts: dict[str, str]) -> str:
    """ "passed", "failed" or "incomplete". What cannot run on a machine ("not run: ...") only has to be said."""
    texts = [text for name, text in facts.items() if name != "check"]
    if facts["check"] not in ("0", "3") or report["failures"] or any(t.startswith("failed") for t in texts):
        return "failed"
    if facts["check"] == "3" or any(t.startswith("unknown") for t in texts):
        return "incomplete"
    return "passed"


def main(path: Path, seconds: int, facts: dict[str, str]) -> int:
    if path.exists():
        report = json.loads(path.read_text())
    else:
        report = {"failures": ["check.py left no report"], "not_measured": []}
    if not report.get("finished"):
        report["failures"].append(f"check.py ended early, with status {facts['check']}")
    report["compute_sanitizer"] = {name: facts[name] for name in ("memcheck", "racecheck")}
    report["api_harness"], report["onnxruntime"] = facts["api_harness"], facts["onnxruntime"]
    report["total_seconds"] = seconds
    report["verdict"] = verdict(report, facts)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(
        f"gpu_check: {report['verdict']}; {len(report['failures'])} failures, {len(report['not_measured'])} cases not "
        f"measured; plugins through the API: {facts['api_harness']}; "
        f"operators in ONNX Runtime: {facts['onnxruntime']}; {seconds} s, {path}"
    )
    return STATUS[report["verdict"]]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), dict(fact.split("=", 1) for fact in sys.argv[3:])))

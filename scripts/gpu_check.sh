#!/usr/bin/env bash
# Builds, checks and times the kernels on a machine with an NVIDIA GPU, torch, nvcc and cmake; needs no network and no
# TensorRT. Under 8 minutes. Where there is no GPU it says so and ends well.
#
#   scripts/gpu_check.sh [--json FILE] [--out DIR]
#
#   --json FILE   where the results go (default build/gpu_check.json)
#   --out DIR     build folder (default build/plugins-gpu)
#   PYTHON        the Python that has torch (default python3)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}" json="$root/build/gpu_check.json" out="$root/build/plugins-gpu"
while [ $# -gt 0 ]; do
  case "$1" in
    --json) json="$2"; shift 2 ;;
    --out) out="$2"; shift 2 ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu_check: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done
mkdir -p "$(dirname "$json")"

capability="$("$python" -c '
import torch
print("".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "")' || true)"
if [ -z "$capability" ]; then
  echo "no GPU: skipped (expected torch.cuda.is_available() in $python)"
  echo '{"skipped": "no GPU"}' >"$json"
  exit 0
fi

started=$SECONDS
"$root/scripts/build_plugins.sh" --kernels-only --arch "$capability-real" --out "$out" --jobs "$(nproc)"
library="$out/libsemkv_kernels.so"
echo "built for sm_$capability in $((SECONDS - started)) s"

status=0
sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)"
verdicts=""
for tool in memcheck racecheck; do
  if [ -z "$sanitizer" ]; then
    verdict="not run: no compute-sanitizer"
  elif timeout 75 "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" "$root/plugins/gpu_check/check.py" \
    --library "$library" --sweep-only 8 >"$out/$tool.log" 2>&1; then
    verdict="clean"
  else
    code=$?
    if [ "$code" = 124 ]; then
      verdict="not finished in 75 s"
    elif grep -q "Device not supported" "$out/$tool.log"; then
      verdict="not run: device not supported here"
    else
      verdict="errors, see $tool.log"
      status=1
      tail -20 "$out/$tool.log"
    fi
  fi
  echo "compute-sanitizer $tool: $verdict"
  verdicts="$verdicts$tool=$verdict;"
done

"$python" "$root/plugins/gpu_check/check.py" --library "$library" --json "$json" || status=1
"$python" - "$json" "$verdicts" "$((SECONDS - started))" <<'PY' || status=1
import json, sys
path, verdicts, seconds = sys.argv[1:]
with open(path) as file:
    report = json.load(file)
report["compute_sanitizer"] = dict(part.split("=", 1) for part in verdicts.split(";") if part)
report["total_seconds"] = int(seconds)
with open(path, "w") as file:
    json.dump(report, file, indent=1)
    file.write("\n")
PY
echo "gpu_check: $((SECONDS - started)) s, $json, $([ $status = 0 ] && echo passed || echo FAILED)"
exit $status

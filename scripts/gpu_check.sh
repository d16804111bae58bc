#!/usr/bin/env bash
# Builds, checks and times the kernels on a machine with an NVIDIA GPU, torch, numpy, nvcc and cmake; needs no network
# and no TensorRT (with its headers the plugins run on the GPU too; with onnx and onnxruntime-gpu the operators for ONNX
# Runtime do). Where there is no GPU it says so and ends well.
#
#   scripts/gpu_check.sh [--json FILE] [--out DIR] [--seconds N]
#
#   --json FILE   where the results go (default build/gpu_check.json)
#   --out DIR     build folder (default build/plugins-gpu)
#   --seconds N   ends within this time; what does not fit is left out and named (default 470)
#   PYTHON        the Python that has torch (default python3)
#
# Exit status: 0 passed (or no GPU), 1 something failed, 3 nothing failed but correctness cases were left out.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}" json="$root/build/gpu_check.json" out="$root/build/plugins-gpu" limit=470
while [ $# -gt 0 ]; do
  case "$1" in
    --json) json="$2"; shift 2 ;;
    --out) out="$2"; shift 2 ;;
    --seconds) limit="$2"; shift 2 ;;
    -h|--help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu_check: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done
mkdir -p "$(dirname "$json")"
rm -f "$json"
give_up() { # What went wrong, as a sentence without quotes.
  echo "gpu_check: $1" >&2
  echo "{\"verdict\": \"failed\", \"failures\": [\"$1\"]}" >"$json"
  exit 1
}

capability="$("$python" -c '
import sys
try:
    import numpy, torch
except ImportError as error:
    sys.exit(print(f"no {error.name}"))
print("".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "no GPU")')" \
  || give_up "$python does not run: set PYTHON to a Python with torch and numpy"
case "$capability" in
  "no GPU")
    echo "no GPU: skipped (expected torch.cuda.is_available() in $python)"
    echo '{"skipped": "no GPU"}' >"$json"
    exit 0 ;;
  "no "*) give_up "$capability in $python: install torch and numpy, or set PYTHON to a Python that has them" ;;
esac

started=$SECONDS
left() { echo $((limit - SECONDS + started)); }
# A host compiler that nvcc does not know yet may well do.
export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -allow-unsupported-compiler"
build() { timeout -k 5 $(($(left) > 0 ? $(left) : 1)) "$root/scripts/build_plugins.sh" --arch "$capability-real" --out "$out" \
  --jobs "$(nproc)" --no-werror "$@"; }
build --kernels-only || give_up "the kernels do not compile, or not within $limit s: see build.log in $out"
echo "built for sm_$capability in $((SECONDS - started)) s"

sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)"
headers="$(PIP_NO_INDEX=1 PYTHON="$python" timeout -k 5 20 "$root/scripts/build_plugins.sh" --print-headers 2>/dev/null || true)"
# What comes after the measurements: two sanitizer runs, the plugins, ONNX Runtime, each only where it can run.
reserve=$((10 + (${#sanitizer} > 0 ? 120 : 0) + (${#headers} > 0 ? 60 : 0) + 60))
seconds=$(($(left) - reserve))
[ "$seconds" -gt 20 ] || seconds=20
checked=0
timeout -k 5 $((seconds + 30)) "$python" "$root/plugins/gpu_check/check.py" --library "$out/libsemkv_kernels.so" \
  --json "$json" --seconds "$seconds" || checked=$?

facts=("check=$checked")
if [ -z "$headers" ]; then
  facts+=("api_harness=not run: no TensorRT headers")
elif ! build --target semkv_api_harness >"$out/harness_build.log" 2>&1; then
  if grep -qE "unknown target|No rule to make target" "$out/harness_build.log"; then
    facts+=("api_harness=not run: the harness is not built for a GPU")
  else
    facts+=("api_harness=failed: does not build, see harness_build.log")
  fi
elif timeout -k 5 60 "$out/semkv_api_harness" >"$out/harness.log" 2>&1; then
  facts+=("api_harness=passed: $(tail -1 "$out/harness.log" | tr -d '"')")
else
  facts+=("api_harness=failed: see harness.log")
  tail -20 "$out/harness.log"
fi
echo "plugins through the API: ${facts[-1]#*=}"

if ! "$python" -c 'import onnx, onnxruntime, sys; sys.exit("CUDAExecutionProvider" not in onnxruntime.get_available_providers())' \
  >/dev/null 2>&1; then
  facts+=("onnxruntime=not run: no onnx and onnxruntime-gpu in this Python")
elif ! PIP_NO_INDEX=1 timeout -k 5 20 "$root/scripts/build_native.sh" --print-headers >/dev/null 2>&1; then
  facts+=("onnxruntime=not run: no ONNX Runtime headers")
elif ! build --kernels-only --onnxruntime --target semkv_onnxruntime_cuda >"$out/onnxruntime_build.log" 2>&1; then
  facts+=("onnxruntime=failed: does not build, see onnxruntime_build.log")
elif timeout -k 5 60 "$python" "$root/plugins/gpu_check/onnxruntime_check.py" \
  --library "$out/libsemkv_onnxruntime_cuda.so" >"$out/onnxruntime.log" 2>&1; then
  facts+=("onnxruntime=passed: $(tail -1 "$out/onnxruntime.log" | tr -d '"')")
else
  facts+=("onnxruntime=failed: see onnxruntime.log")
  tail -20 "$out/onnxruntime.log"
fi
echo "operators in ONNX Runtime: ${facts[-1]#*=}"

# memcheck sees one allocation of torch's as one piece of memory: without the caching allocator that is one tensor.
# Errors of API calls are left to their callers (torch tries some that may fail); kernels not ours are not watched.
watched=()
help="$([ -z "$sanitizer" ] || "$sanitizer" --help 2>&1 || true)"
[[ "$help" == *--report-api-errors* ]] && watched+=(--report-api-errors no)
[[ "$help" == *--kernel-regex* ]] && watched+=(--kernel-regex kns=semkv)
for tool in memcheck racecheck; do
  log="$out/$tool.log"
  budget=$(($(left) / ($([ "$tool" = memcheck ] && echo 2 || echo 1)) - 20))
  [ "$budget" -lt 60 ] || budget=60
  if [ -z "$sanitizer" ]; then
    verdict="not run: no compute-sanitizer"
  elif [ "$budget" -lt 10 ]; then
    verdict="unknown: not run, no time left"
  else
    code=0
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 $((budget + 20)) "$sanitizer" --tool "$tool" --error-exitcode 9 \
      ${watched[@]+"${watched[@]}"} "$python" "$root/plugins/gpu_check/check.py" --library "$out/libsemkv_kernels.so" \
      --sweep-only 0.3 --seconds "$budget" >"$log" 2>&1 || code=$?
    cases="$(sed -n 's/^sweep: \([0-9]* of [0-9]* cases\).*/\1/p' "$log" | tail -1)"
    case "$code" in
      0) verdict="clean: $cases" ;;
      3) verdict="unknown: clean so far, $cases in $budget s" ;;
      124|137) verdict="unknown: not finished in $((budget + 20)) s" ;;
      *)
        if grep -q "Device not supported" "$log"; then
          verdict="not run: device not supported here"
        else
          verdict="failed: errors, see $tool.log"
          tail -20 "$log"
        fi ;;
    esac
  fi
  [ "$tool" = memcheck ] || verdict="$verdict (shared memory only)"
  echo "compute-sanitizer $tool: $verdict"
  facts+=("$tool=$verdict")
done

status=0
"$python" "$root/plugins/gpu_check/verdict.py" "$json" "$((SECONDS - started))" "${facts[@]}" || status=$?
exit $status

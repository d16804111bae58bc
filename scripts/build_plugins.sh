#!/usr/bin/env bash
# Builds plugins/: libsemkv_plugins.so, libsemkv_autoload.so and libsemkv_kernels.so (the kernels with a C interface).
#
#   scripts/build_plugins.sh [--arch LIST] [--out DIR] [--kernels-only] [--emulated] [--sanitize] [--target NAME]
#
#   --arch LIST      compute capabilities, e.g. "80;90" (one per machine code) or "native"; default: 75 to 120 and PTX
#   --out DIR        build folder (default build/plugins, or build/plugins-emulated)
#   --kernels-only   no TensorRT headers needed, no plugins built
#   --emulated       compile the kernels for the CPU (tests), --sanitize adds the address and undefined-behaviour sanitizers
#   --target NAME    build one CMake target only
#   --jobs N         parallel compilations (default 1)
#   --no-werror      warnings of a compiler nobody has tried do not stop the build
#   --print-headers  print the folder of the TensorRT headers and build nothing
#
# The full output, with every kernel's registers and spills, is in build.log in the build folder.
#
# TensorRT headers, first match: $TENSORRT_ROOT/include; the system's /usr/include and its architecture folder; the cache
# folder ${XDG_CACHE_HOME:-~/.cache}/semkv-deploy; the PyPI wheel kernel-lens==2.0.1 (Apache-2.0 headers of 10.14),
# downloaded into that cache. nvcc: $CUDACXX, PATH, /usr/local/cuda. Asks nothing; needs no network once the headers are
# there.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
arch="" out="" kernels_only=0 emulated=0 sanitize=0 target="" jobs=1 print_headers=0 werror=ON
while [ $# -gt 0 ]; do
  case "$1" in
    --arch) arch="$2"; shift 2 ;;
    --out) out="$2"; shift 2 ;;
    --kernels-only) kernels_only=1; shift ;;
    --emulated) emulated=1; shift ;;
    --sanitize) sanitize=1; shift ;;
    --target) target="$2"; shift 2 ;;
    --jobs) jobs="$2"; shift 2 ;;
    --no-werror) werror=OFF; shift ;;
    --print-headers) print_headers=1; shift ;;
    -h|--help) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "build_plugins: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done

find_headers() {
  local cache="${XDG_CACHE_HOME:-$HOME/.cache}/semkv-deploy/tensorrt-headers-10.14"
  local folder
  if [ -n "${TENSORRT_ROOT:-}" ]; then
    if [ ! -f "$TENSORRT_ROOT/include/NvInferRuntime.h" ]; then
      echo "build_plugins: TENSORRT_ROOT has no include/NvInferRuntime.h: expected the TensorRT SDK's folder, got '$TENSORRT_ROOT'" >&2
      return 1
    fi
    echo "$TENSORRT_ROOT/include"
    return
  fi
  for folder in /usr/include "/usr/include/$(uname -m)-linux-gnu" "$cache"; do
    if [ -f "$folder/NvInferRuntime.h" ]; then echo "$folder"; return; fi
  done
  local scratch
  scratch="$(mktemp -d)"
  if ! "${PYTHON:-python3}" -m pip download -q --no-deps --disable-pip-version-check -d "$scratch" kernel-lens==2.0.1 >&2; then
    rm -rf "$scratch"
    echo "build_plugins: no TensorRT headers: set TENSORRT_ROOT to the SDK, or make the PyPI wheel kernel-lens==2.0.1 reachable (network or PIP_FIND_LINKS), or use --kernels-only" >&2
    return 1
  fi
  "${PYTHON:-python3}" -m zipfile -e "$scratch"/kernel_lens-*.whl "$scratch/unpacked"
  mkdir -p "$(dirname "$cache")"
  rm -rf "$cache"
  mv "$scratch/unpacked/kernel_lens/include/tensorrt" "$cache"
  rm -rf "$scratch"
  echo "$cache"
}

if [ "$print_headers" = 1 ]; then
  find_headers
  exit
fi
options=(-DCMAKE_BUILD_TYPE=Release "-DSEMKV_WERROR=$werror")
if [ "$kernels_only" = 1 ]; then
  options+=(-DSEMKV_PLUGINS=OFF)
else
  headers="$(find_headers)"
  options+=(-DSEMKV_PLUGINS=ON "-DSEMKV_TENSORRT_INCLUDE=$headers")
fi
if [ "$emulated" = 1 ]; then
  options+=(-DSEMKV_EMULATED=ON "-DSEMKV_SANITIZE=$sanitize")
  out="${out:-$root/build/plugins-emulated}"
else
  compiler="${CUDACXX:-$(command -v nvcc || true)}"
  [ -n "$compiler" ] || compiler="$(ls /usr/local/cuda/bin/nvcc /usr/local/cuda-*/bin/nvcc 2>/dev/null | tail -1 || true)"
  if [ -z "$compiler" ]; then
    echo "build_plugins: no nvcc: expected it in CUDACXX, on PATH or under /usr/local/cuda; install the CUDA toolkit, or use --emulated for a CPU build" >&2
    exit 1
  fi
  options+=("-DCMAKE_CUDA_COMPILER=$compiler")
  [ -z "$arch" ] || options+=("-DCMAKE_CUDA_ARCHITECTURES=$arch")
  out="${out:-$root/build/plugins}"
fi
command -v ninja >/dev/null && options+=(-G Ninja)
mkdir -p "$out"
echo '*' >"$out/.gitignore"
cmake -S "$root/plugins" -B "$out" "${options[@]}" >"$out/configure.log" 2>&1 || {
  cat "$out/configure.log" >&2; exit 1; }
# ptxas reports every kernel's registers and spills; they go to the log only.
cmake --build "$out" -j "$jobs" ${target:+--target "$target"} 2>&1 | tee -a "$out/build.log" \
  | grep --line-buffered -vE "^ptxas info|bytes stack frame|^$|nvlink info"
echo "build_plugins: done, $out"

#!/usr/bin/env bash
# Builds plugins/: libsemkv_plugins.so, libsemkv_autoload.so and libsemkv_kernels.so (the kernels with a C interface).
#
#   scripts/build_plugins.sh [--arch LIST] [--out DIR] [--kernels-only] [--onnxruntime] [--emulated] [--sanitize]
#                            [--target NAME]
#
#   --arch LIST      compute capabilities, e.g. "80;90" (one per machine code) or "native"; default: 75 to 120 and PTX
#   --out DIR        build folder (default build/plugins, or build/plugins-emulated)
#   --kernels-only   no TensorRT headers needed, no plugins built
#   --onnxruntime    libsemkv_onnxruntime_cuda.so too, for ONNX Runtime (scripts/build_native.sh cuda builds and installs it)
#   --emulated       compile the kernels for the CPU (tests), --sanitize adds the address and undefined-behaviour sanitizers
#   --target NAME    build one CMake target only
#   --jobs N         parallel compilations (default 1)
#   --no-werror      warnings of a compiler nobody has tried do not stop the build
#   --print-headers  print the folder of the TensorRT headers and build nothing
#   --print-nvcc     print the path of nvcc and build nothing
#
# Settings are those of this call, whatever the build folder was made with before.
# The full output, with every kernel's registers and spills, is in build.log in the build folder.
#
# TensorRT headers, first match: $TENSORRT_ROOT/include; the system's /usr/include and its architecture folder; the PyPI
# wheel kernel-lens==2.0.1 (Apache-2.0 headers of 10.14) as installed for $PYTHON (default python3), or as downloaded into
# the cache folder ${XDG_CACHE_HOME:-~/.cache}/semkv-deploy. nvcc: $CUDACXX; PATH; cuda, else the newest cuda-* in
# ${CUDA_TOOLKITS:-/usr/local}; the PyPI wheels nvidia-cuda-nvcc and nvidia-cuda-cccl as installed for $PYTHON. Asks nothing;
# needs no network once the headers are there. ONNX Runtime headers: as scripts/build_native.sh finds them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
arch="" out="" kernels_only=0 onnxruntime=0 emulated=0 sanitize=0 target="" jobs=1 print="" werror=ON
while [ $# -gt 0 ]; do
  case "$1" in
    --arch|--out|--target|--jobs)
      if [ -z "${2:-}" ]; then echo "build_plugins: option $1: expected a value, got none; see --help" >&2; exit 2; fi
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --kernels-only) kernels_only=1; shift ;;
    --onnxruntime) onnxruntime=1; shift ;;
    --emulated) emulated=1; shift ;;
    --sanitize) sanitize=1; shift ;;
    --no-werror) werror=OFF; shift ;;
    --print-headers|--print-nvcc) print="${1#--print-}"; shift ;;
    -h|--help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "build_plugins: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done

# The first of these paths below site-packages that the Python has, if any.
in_site_packages() {
  "$python" - "$@" <<'PY' 2>/dev/null || true
import os, sys
found = (os.path.join(folder, name) for folder in sys.path if folder for name in sys.argv[1:])
print(next((path for path in found if os.path.exists(path)), ""))
PY
}

find_headers() {
  local caches="${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}"
  local cache="${caches:-${TMPDIR:-/tmp}}/semkv-deploy/tensorrt-headers-10.14"
  local folder
  if [ -n "${TENSORRT_ROOT:-}" ]; then
    if [ ! -f "$TENSORRT_ROOT/include/NvInferRuntime.h" ]; then
      echo "build_plugins: TENSORRT_ROOT has no include/NvInferRuntime.h: expected the TensorRT SDK's folder, got '$TENSORRT_ROOT'" >&2
      return 1
    fi
    echo "$TENSORRT_ROOT/include"
    return
  fi
  for folder in /usr/include "/usr/include/$(uname -m)-linux-gnu" "$(in_site_packages kernel_lens/include/tensorrt)" "$cache"; do
    if [ -f "$folder/NvInferRuntime.h" ]; then echo "$folder"; return; fi
  done
  local scratch
  mkdir -p "$(dirname "$cache")"
  scratch="$(mktemp -d "$cache.XXXXXX")"
  if ! "$python" -m pip download -q --no-deps --disable-pip-version-check -d "$scratch" kernel-lens==2.0.1 >&2; then
    rm -rf "$scratch"
    echo "build_plugins: no TensorRT headers: set TENSORRT_ROOT to the SDK, or make the PyPI wheel kernel-lens==2.0.1 reachable (network or PIP_FIND_LINKS), or use --kernels-only" >&2
    return 1
  fi
  "$python" -m zipfile -e "$scratch"/kernel_lens-*.whl "$scratch/unpacked"
  # Where another run was faster, its headers are as good and may be in use.
  if ! mv -T "$scratch/unpacked/kernel_lens/include/tensorrt" "$cache" 2>/dev/null && [ ! -f "$cache/NvInferRuntime.h" ]; then
    rm -rf "$cache"
    mv -T "$scratch/unpacked/kernel_lens/include/tensorrt" "$cache"
  fi
  rm -rf "$scratch"
  echo "$cache"
}

find_nvcc() {
  local compiler="${CUDACXX:-$(command -v nvcc || true)}"
  [ -n "$compiler" ] || compiler="$(ls -d "${CUDA_TOOLKITS:-/usr/local}"/cuda*/bin/nvcc 2>/dev/null | sort -V | tail -1 || true)"
  [ -n "$compiler" ] || compiler="$(in_site_packages nvidia/cu13/bin/nvcc nvidia/cu12/bin/nvcc)"
  if [ -z "$compiler" ]; then
    echo "build_plugins: no nvcc: expected it in CUDACXX, on PATH, under ${CUDA_TOOLKITS:-/usr/local} or in $python's packages; install the CUDA toolkit or the PyPI wheels nvidia-cuda-nvcc and nvidia-cuda-cccl, or use --emulated for a CPU build" >&2
    return 1
  fi
  echo "$compiler"
}

if [ -n "$print" ]; then
  "find_$print"
  exit
fi
options=(-DCMAKE_BUILD_TYPE=Release "-DSEMKV_WERROR=$werror")
if [ "$kernels_only" = 1 ]; then
  options+=(-DSEMKV_PLUGINS=OFF)
else
  headers="$(find_headers)"
  options+=(-DSEMKV_PLUGINS=ON "-DSEMKV_TENSORRT_INCLUDE=$headers")
fi
ort_headers=""
if [ "$onnxruntime" = 1 ]; then
  me=build_plugins
  . "$root/scripts/headers.sh"
  ort_headers="$(find_onnxruntime)"
fi
options+=("-DSEMKV_ONNXRUNTIME_INCLUDE=$ort_headers")
options+=("-DSEMKV_EMULATED=$emulated" "-DSEMKV_SANITIZE=$sanitize")
if [ "$emulated" = 1 ]; then
  out="${out:-$root/build/plugins-emulated}"
else
  out="${out:-$root/build/plugins}"
  compiler="$(find_nvcc)"
  options+=("-DCMAKE_CUDA_COMPILER=$compiler")
  # The wheels have the runtime's shared library under its versioned name only, where CMake does not look for it.
  library="$(ls "$(dirname "$compiler")"/../lib/libcudart.so.* 2>/dev/null | tail -1 || true)"
  if [ -n "$library" ] && [ ! -e "${library%.so.*}.so" ]; then options+=("-DCUDA_CUDART=$library"); fi
  if [ -n "$arch" ]; then options+=("-DCMAKE_CUDA_ARCHITECTURES=$arch"); else options+=(-UCMAKE_CUDA_ARCHITECTURES); fi
  # CMake would start over by itself, but without the other options.
  cache="$out/CMakeCache.txt"
  if [ -f "$cache" ] && ! grep -q "^CMAKE_CUDA_COMPILER:[A-Z]*=$compiler\$" "$cache"; then rm -f "$cache"; fi
fi
command -v ninja >/dev/null && options+=(-G Ninja)
mkdir -p "$out"
echo '*' >"$out/.gitignore"
cmake -S "$root/plugins" -B "$out" "${options[@]}" >"$out/configure.log" 2>&1 || {
  cat "$out/configure.log" >&2; exit 1; }
# ptxas reports every kernel's registers and spills; they go to the log only.
cmake --build "$out" -j "$jobs" ${target:+--target "$target"} 2>&1 | tee -a "$out/build.log" \
  | { grep --line-buffered -vE "^ptxas info|bytes stack frame|^$|nvlink info" || true; }
echo "build_plugins: done, $out"

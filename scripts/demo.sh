#!/usr/bin/env bash
# SmolLM2-135M-Instruct in a fifth of its KV cache: export, build, and one long conversation, compared with the full cache.
set -euo pipefail
. "$(dirname "$0")/environment.sh" cpu
exec python scripts/demo.py "$@"

#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" cpu,bench,rtx,dev
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"

#!/usr/bin/env bash
# Lint, types and tests, two at a time (SEMKV_TEST_WORKERS=n for n; each may hold a real model). Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" cpu,bench,rtx,serve,ray,dev
scripts/triton.sh || echo "no Triton server: its tests are skipped" >&2
ruff check .
ruff format --check .
mypy
workers="${SEMKV_TEST_WORKERS:-2}"
# What sessions, hosts and validation promise, once more with native operators in the bundles.
if [ "$#" -eq 0 ]; then
    python -m pytest --numprocesses "$workers" --dist worksteal --native on tests/runtime tests/validate/test_mutations.py
fi
# Neighbours stay together, so that what a file sets up is set up once; a worker that is done takes from the other's end.
exec python -m pytest --numprocesses "$workers" --dist worksteal "$@"

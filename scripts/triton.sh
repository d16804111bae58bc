#!/usr/bin/env bash
# Installs a Triton server and its gRPC client into .triton, for tests/serve/triton/test_server.py: 250 MB, half a minute.
# NumPy is for the server alone: its Python backend does not take NumPy 2.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.triton/installed-$(cksum < scripts/triton.sh | cut -d' ' -f1)
[ ! -e "$stamp" ] || exit 0
rm -rf .triton
"${PYTHON:-.venv/bin/python}" -m pip install --quiet --no-deps --target .triton \
    nvidia-pytriton==0.7.0 tritonclient==2.73.0 grpcio 'protobuf>=6,<7' python-rapidjson numpy==1.26.4
touch "$stamp"

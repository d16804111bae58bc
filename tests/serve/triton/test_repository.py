"""What is written: a model that is whole, beside others, and replaces nothing that this tool did not write."""

from __future__ import annotations

from pathlib import Path

import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.triton.inputs import INPUTS, OUTPUTS
from semkv_deploy.serve.triton.repository import write_repository

from .config import parse


def test_the_configuration_says_what_was_asked_for(tiny_bundle: Path, tmp_path: Path):
    options = ServingOptions(rows=7, save_sessions=Path('a "quoted" ä'))
    model = write_repository(tiny_bundle, tmp_path / "r", "chat", options, budget="256tokens")
    config = parse((model / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("chat", "python", 0)
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert [each["name"] for each in config["input"]] == [each.name for each in INPUTS]
    assert all(each["optional"] is True for each in config["input"])
    assert [(each["name"], each["data_type"], each["dims"]) for each in config["output"]] == [
        (each.name, f"TYPE_{each.type}", [each.size]) for each in OUTPUTS
    ]
    given = {name: value["string_value"] for name, value in config["parameters"].items()}
    assert given.pop("budget") == "0.5" and given.pop("target") == "onnxruntime-cpu"
    assert given.pop("save_sessions") == str(Path('a "quoted" ä').resolve())
    assert ServingOptions.model_validate(given) == ServingOptions(rows=7)
    assert Bundle.open(model / "1" / "bundle").fingerprint == Bundle.open(tiny_bundle).fingerprint


def test_models_stand_beside_each_other_and_are_replaced_when_asked(tiny_bundle: Path, tmp_path: Path):
    for name in ("one", "two"):
        write_repository(tiny_bundle, tmp_path, name, ServingOptions())
    with pytest.raises(SemkvError, match="already exists"):
        write_repository(tiny_bundle, tmp_path, "one", ServingOptions())
    (tmp_path / "one" / "1" / "__pycache__").mkdir()
    write_repository(tiny_bundle, tmp_path, "one", ServingOptions(rows=9), force=True)
    assert 'string_value: "9"' in (tmp_path / "one" / "config.pbtxt").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("added", ["mine", "2/model.py", "1/mine", "1/bundle/onnx/mine"])
def test_what_others_wrote_is_not_replaced(added: str, tiny_bundle: Path, tmp_path: Path):
    model = write_repository(tiny_bundle, tmp_path, "chat", ServingOptions())
    (model / added).parent.mkdir(exist_ok=True)
    (model / added).touch()
    with pytest.raises(SemkvError, match="holds more than this tool wrote"):
        write_repository(tiny_bundle, tmp_path, "chat", ServingOptions(), force=True)
    assert (model / added).exists()


def test_a_configuration_of_somebody_else(tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.pbtxt").write_text('name: "chat"\n', encoding="utf-8")
    with pytest.raises(SemkvError, match=r"holds more than this tool wrote.*got config\.pbtxt"):
        write_repository(tiny_bundle, tmp_path, "chat", ServingOptions(), force=True)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b"])
def test_names_that_are_none(name: str, tiny_bundle: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match="--name: not a name for a model"):
        write_repository(tiny_bundle, tmp_path, name, ServingOptions())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_what_fails(tiny_bundle: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match="the bundle has no such budget"):
        write_repository(tiny_bundle, tmp_path / "r", "chat", ServingOptions(), budget=0.3)
    with pytest.raises(SemkvError, match="the bundle was not built for this target"):
        write_repository(tiny_bundle, tmp_path / "r", "chat", ServingOptions(), target="tensorrt-rtx")
    assert list(tmp_path.iterdir()) == []


def test_the_cpp_backends_model_is_the_same_but_for_python(tiny_bundle: Path, tmp_path: Path):
    python, cpp = (
        write_repository(tiny_bundle, tmp_path, backend, ServingOptions(), backend=backend)
        for backend in ("python", "cpp")
    )
    theirs, ours = (parse((model / "config.pbtxt").read_text(encoding="utf-8")) for model in (python, cpp))
    assert (ours.pop("backend"), ours.pop("name"), theirs.pop("backend"), theirs.pop("name")) == (
        "semkv",
        "cpp",
        "python",
        "python",
    )
    assert ours == theirs
    assert not (cpp / "1" / "model.py").exists() and (cpp / "1" / "bundle" / "bundle.json").is_file()
    write_repository(tiny_bundle, tmp_path, "cpp", ServingOptions(), backend="cpp", force=True)

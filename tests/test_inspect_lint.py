"""`inspect --lint` as a user meets it, on files and on bundles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest

from semkv_deploy.lint_report import lint_bundle, lint_file

APPEND = """
<ir_version: 10, opset_import: ["" : 24]>
g (float16[1,4,1,64] q, float16[1,2,{capacity},64] c, float16[1,2,8,64] v, float16[1,2,1,64] u, int64[1] i)
=> (float16[1,4,1,64] y, float16[1,2,{capacity},64] o) {{
  o = TensorScatter<axis=-2>(c, u, i)
  y = Attention(q, o, v{length})
}}
"""


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "semkv_deploy.cli", "inspect", "--lint", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def written(path: Path, *, capacity: int | str = 8, length: str = "") -> Path:
    onnx.save(onnx.parser.parse_model(APPEND.format(capacity=capacity, length=length)), path)
    return path


def test_clean_file(tmp_path: Path):
    done = cli(written(tmp_path / "model.onnx"))
    assert done.returncode == 0, done.stderr
    assert "nothing found" in done.stdout


@pytest.mark.parametrize(
    ("model", "verdict", "what"),
    [
        ({"capacity": "C"}, "blocked", "the capacity is dynamic (C)"),
        ({"length": ",,,, i"}, "wrong", "nonpad_kv_seqlen is ignored"),
    ],
)
def test_fatal_finding_fails(tmp_path: Path, model: dict[str, str], verdict: str, what: str):
    path = written(tmp_path / "model.onnx", **model)
    done = cli(path)
    assert done.returncode == 1 and f"1 {verdict}" in done.stdout and what in done.stdout
    data = json.loads(cli(path, "--json").stdout)
    fatal = [finding for finding in data[0]["findings"] if finding["fatal"]]
    assert data[0]["file"] == str(path) and data[0]["target"] == "tensorrt-rtx"
    assert [finding["verdict"] for finding in fatal] == [verdict] and what in fatal[0]["what"]


def test_same_finding_in_many_nodes_is_one_row(tmp_path: Path):
    body = " ".join(f'y{i} = ScatterND<reduction="add">(x, i, u)' for i in range(5))
    outputs = ", ".join(f"float[8,4] y{i}" for i in range(5))
    text = f'<ir_version: 10, opset_import: ["" : 24]> g (float[8,4] x, int64[2,1] i, float[2,4] u) => ({outputs})'
    onnx.save(onnx.parser.parse_model(f"{text} {{ {body} }}"), tmp_path / "model.onnx")
    done = cli(tmp_path / "model.onnx")
    assert "5 blocked" in done.stdout and "and 4 more" in done.stdout and done.stdout.count('reduction "add"') == 1


def test_rules_are_those_of_the_target(tmp_path: Path):
    path = written(tmp_path / "model.onnx", capacity="C")
    done = cli(path, "--target", "onnxruntime-cpu")
    assert done.returncode == 0 and "nothing found" in done.stdout


def test_weights_are_looked_for_and_not_loaded(tmp_path: Path):
    """A file far larger than memory is only measured."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24]> g (float[1] x) => (float[1] y) { y = Mul(x, w) }'
    )
    weight = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1 << 36])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="model.data")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    missing = cli(tmp_path / "model.onnx")
    assert missing.returncode == 1 and "external data is missing: model.data" in missing.stdout
    with (tmp_path / "model.data").open("wb") as file:
        file.truncate(1 << 38)
    assert cli(tmp_path / "model.onnx").returncode == 0
    with (tmp_path / "model.data").open("wb") as file:
        file.truncate(1 << 37)
    assert "truncated" in cli(tmp_path / "model.onnx").stdout


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, (), "no such file"),
        (b"this is no model", (), "not an ONNX model"),
        (b"", ("--target", "openvino"), "no lint rules"),
    ],
)
def test_bad_input(tmp_path: Path, content: bytes | None, arguments: tuple[str, ...], words: str):
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    done = cli(tmp_path / "model.onnx", *arguments)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_bundle(tiny_bundle: Path):
    done = cli(tiny_bundle, "--json")
    data = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [entry["file"].split("/")[-1] for entry in data] == ["decoder.onnx", "compressor.onnx"]
    assert {entry["target"] for entry in data} == {"onnxruntime-cpu"}


def test_bundle_for_tensorrt_has_its_rules(tiny_export: Path, tmp_path: Path):
    """Graphs only: no TensorRT is needed. Nothing is found: dynamic inputs have profiles in the contract."""
    from semkv_deploy.build import build_bundle
    from semkv_deploy.methods import SemantiCache
    from semkv_deploy.targets.tensorrt_build import TensorRTOptions

    out = tmp_path / "bundle"
    build_bundle(
        str(tiny_export / "decoder.onnx"),
        out,
        budgets=[0.5],
        method=SemantiCache(),
        target=["tensorrt-rtx"],
        weights="fp32",
        tensorrt=TensorRTOptions(engines=False),
    )
    linted = lint_bundle(out)
    assert {graph.target for graph in linted} == {"tensorrt-rtx"} and len(linted) >= 2
    assert not [finding for graph in linted for finding in graph.findings]
    alone = lint_file(linted[0].path, "tensorrt-rtx")
    assert {finding.rule for finding in alone.findings} == {"dynamic_input"}

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

from semkv_deploy.cli.lint_report import LINTED, lint_bundle, lint_file
from semkv_deploy.errors import SemkvError

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


BRANCHES = (
    "y = If(b) <then_branch: graph = t () => (float[4] z) { z = mine.Twice(x) }, "
    "else_branch: graph = e () => (float[4] w) { w = Neg(x) }>"
)
FUNCTIONS = '<ir_version: 10, opset_import: ["" : 24, "mine" : 1]> g (float[4] x, bool b) => (float[4] y) { %s }'
TWICE = '\n<opset_import: ["" : 24, "mine" : 1], domain: "mine"> Twice (x) => (y) { %s }'
LOOP = "n = Constant<value = int64 {4}>() y = Loop(n, b, x) <body: graph = f (int64 j, bool c, float[4] s) => "
LOOP += "(bool d, float[4] o) { d = Identity(c) o = Tanh(s) }>"


def function_model(body: str, function: str = "y = Add(x, x)") -> onnx.ModelProto:
    return onnx.parser.parse_model(FUNCTIONS % body + TWICE % function)


def changed(change: str, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """The model, `APPEND` by default, after a statement on it, its graph g and its first and last nodes a and z."""
    model = model or onnx.parser.parse_model(APPEND.format(capacity=8, length=""))
    graph = model.graph
    exec(change, {"model": model, "g": graph, "a": graph.node[0], "z": graph.node[-1]})
    return model


def with_external(**record: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(FUNCTIONS % "y = Add(x, w)")
    weight = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **record}.items():
        weight.external_data.add(key=key, value=value)
    return model


MALFORMED = {
    "element type of an input": (changed("g.input[0].type.tensor_type.elem_type = 99"), "q: an element type .*got 99"),
    "element type of an output": (changed("g.output[0].type.tensor_type.elem_type = 99"), "y: an element type"),
    "element type of a weight": (changed("g.initializer.add(name='w', data_type=99)"), "w: an element type"),
    "element type of a constant": (
        changed("a.attribute[0].t.data_type = 99", onnx.parser.parse_model(FUNCTIONS % LOOP)),
        "value of Constant -> n: an element type",
    ),
    "function of itself": (
        function_model("y = mine.Twice(x)", "y = mine.Twice(x)"),
        "mine.Twice -> mine.Twice: functions",
    ),
    "function of itself in a branch": (
        function_model("y = mine.Twice(x)", f"b = Not(x) {BRANCHES}"),
        "call each other in a circle",
    ),
    "no inputs": (changed("del a.input[:]"), "TensorScatter has too few inputs .*at least 2, got 0"),
    "no inputs of Attention": (changed("del z.input[:]"), "Attention has too few inputs"),
    "no inputs of TensorRT's own": (
        changed("a.op_type = 'TRT_KVCacheUpdate'; del a.input[:]"),
        "TRT_KVCacheUpdate has too few inputs",
    ),
    "no outputs": (changed("del z.output[:]"), "Attention .*: a node makes nothing"),
    "empty output": (changed("z.output[:] = ['']"), "a node makes nothing"),
    "Loop without a body": (
        changed("del z.attribute[:]", onnx.parser.parse_model(FUNCTIONS % LOOP)),
        "Loop lacks its attribute body",
    ),
    "Loop with a number for a body": (
        changed("z.attribute[0].ClearField('g'); z.attribute[0].i = 1", onnx.parser.parse_model(FUNCTIONS % LOOP)),
        "Loop lacks its attribute body",
    ),
    "If without a branch": (
        changed("del z.attribute[0]", function_model(BRANCHES)),
        "If lacks its attribute then_branch",
    ),
    "cycle of Identity": (
        changed(
            "z.input[1] = 'r'; g.node.add(op_type='Identity', input=['s'], output=['r']); "
            "g.node.add(op_type='Identity', input=['r'], output=['s'])"
        ),
        "the graph has a cycle",
    ),
    "Identity of itself": (
        changed("z.input[1] = 'r'; g.node.add(op_type='Identity', input=['r'], output=['r'])"),
        "Identity -> r -> Identity -> r: the graph has a cycle",
    ),
    "cycle in a branch": (
        changed("z.attribute[0].g.node[0].input[0] = 'z'", function_model(BRANCHES)),
        "the graph has a cycle",
    ),
    "unknown value": (
        changed("z.input[1] = 'nothing'"),
        "Attention -> y: a node reads what nothing makes .*got nothing",
    ),
    "unknown output": (changed("g.output[0].name = 'nothing'"), "an output is made by no node .*got nothing"),
    "value made twice": (changed("z.output[0] = 'o'"), "make one value .*got o"),
    "opset": (changed("model.opset_import[0].version = -1"), "an opset version that cannot be"),
}
"""A model that is none, and what is said of it."""


@pytest.mark.parametrize(("model", "words"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("target", LINTED)
def test_malformed_model_gets_a_sentence(tmp_path: Path, model: onnx.ModelProto, words: str, target: str):
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SemkvError, match=words):
        lint_file(tmp_path / "model.onnx", target)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"offset": "abc"}, "offset 'abc', which is no number"),
        ({"length": "-4"}, "length '-4', which is no number"),
        ({"length": "1e3"}, "no number"),
        ({"offset": "²"}, "no number"),
        ({"location": ""}, "without a location"),
    ],
)
def test_malformed_external_data_is_a_finding(tmp_path: Path, record: dict[str, str], words: str):
    (tmp_path / "model.onnx").write_bytes(with_external(**record).SerializeToString())
    (finding,) = lint_file(tmp_path / "model.onnx", "tensorrt-rtx").findings
    assert finding.rule == "external_data" and words in finding.what


def test_malformed_model_on_the_command_line(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(MALFORMED["cycle of Identity"][0].SerializeToString())
    done = cli(tmp_path / "model.onnx")
    assert done.returncode == 1 and "the graph has a cycle" in done.stderr and "Traceback" not in done.stderr


def test_unsorted_graph_is_taken(tmp_path: Path):
    """Every runtime sorts; only a cycle has no order."""
    model = changed("nodes = list(g.node); del g.node[:]; g.node.extend(reversed(nodes))")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert lint_file(tmp_path / "model.onnx", "tensorrt-rtx").findings == []


FUZZ = Path(__file__).parents[1] / "lint" / "lint_fuzz_worker.py"


def test_damaged_models_get_findings_or_a_sentence():
    """Several hundred models with random damage, in one child process: no traceback, no crash, no hang."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(FUZZ), "400"], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) == 400 and counts["sentence"] > 40 and counts["findings"] > 40


def test_bundle(tiny_bundle: Path):
    done = cli(tiny_bundle, "--json")
    data = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [entry["file"].split("/")[-1] for entry in data] == ["decoder.onnx", "compressor.onnx"]
    assert {entry["target"] for entry in data} == {"onnxruntime-cpu"}


def test_bundle_for_tensorrt_has_its_rules(tiny_export: Path, tmp_path: Path):
    """Graphs only: no TensorRT is needed. Nothing is found: dynamic inputs have profiles in the contract."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import SemantiCache
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions

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


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-rtx"])
def test_file_rules_hold_for_every_target(target: str, tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(with_external(location="../up.data").SerializeToString())
    found = [finding for finding in lint_file(tmp_path / "model.onnx", target).findings if finding.fatal]
    assert [finding.rule for finding in found] == ["external_data"]


def of_nodes(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) {{ {text} }}'
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("y = NoSuchOperator (x)", "NoSuchOperator"),
        ("y = Relu (x, x)", "Relu"),
        ("y = Cast <to = 7> (x)", "Type Error"),
    ],
)
def test_what_onnx_runtime_refuses_is_refused(text: str, words: str, tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(of_nodes(text).SerializeToString())
    (finding,) = lint_file(tmp_path / "model.onnx", "onnxruntime-cpu").findings
    assert finding.fatal and finding.rule == "load" and words in finding.what
    assert str(tmp_path) not in finding.what


def test_what_onnx_runtime_takes_passes(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(of_nodes("y = Relu (x)").SerializeToString())
    assert lint_file(tmp_path / "model.onnx", "onnxruntime-cpu").findings == []

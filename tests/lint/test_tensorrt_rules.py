"""Every rule on its smallest model and a neighbour, and against what TensorRT-RTX does with both."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt.attention import FLOAT, FLOAT16, kernel_refusal
from semkv_deploy.lint.tensorrt.operators import UNKNOWN_STANDARD
from semkv_deploy.lint.tensorrt.rules import RULES, lint_tensorrt
from semkv_deploy.targets.tensorrt.api import library_environment, missing

from .tensorrt_cache_cases import CACHE_CASES
from .tensorrt_lint_cases import CASES, Case, attend
from .tensorrt_own_cases import OWN, OWN_CASES, attended
from .tensorrt_rows import IMPORTER, KERNELS, ROW_CASES, Row

WORKER = Path(__file__).with_name("rtx_lint_worker.py")
EVERY = [*CASES, *CACHE_CASES, *OWN_CASES, *ROW_CASES]
UNIQUE = {f"{number:03d} {case.name}": case for number, case in enumerate(EVERY)}
ROWS = [*IMPORTER, *KERNELS]


def found(rule: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.rule == rule]


@pytest.mark.parametrize("case", UNIQUE.values(), ids=UNIQUE)
def test_rule(case: Case):
    findings = lint_tensorrt(case.model())
    mine = found(case.rule, findings)
    assert {finding.verdict for finding in mine} == ({case.verdict} if case.verdict else set()), findings
    if case.verdict is None and case.buildable:
        assert not [finding for finding in findings if finding.fatal], "the neighbour triggers another rule"


def test_every_rule_has_both_cases():
    triggered = {case.rule for case in EVERY if case.verdict} | {"external_data"}
    silent = {case.rule for case in EVERY if case.verdict is None} | {"external_data"}
    assert {rule.__name__ for rule in RULES} == triggered == silent
    assert len({rule.__name__ for rule in RULES}) == len(RULES) and all(rule.__doc__ for rule in RULES)


@pytest.mark.parametrize("row", ROWS, ids=[row.construct for row in ROWS])
def test_row_of_the_tables(row: Row):
    """Each measured construct is known by its rules and no others; what is fine is found fine."""
    assert row.cases
    fatal = {finding.rule for case in row.cases for finding in lint_tensorrt(case.model()) if finding.fatal}
    assert fatal == set(row.rules)


def test_inputs_that_plugins_and_functions_have_are_seen_inside_functions():
    """An Attention in a local function is linted as the importer sees it: inlined."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 24, "mine" : 1]>
        g (float16[1,4,1,64] q, float16[1,2,8,64] k, int64[1] n) => (float16[1,4,1,64] o) { o = mine.Layer(q, k, n) }
        <opset_import: ["" : 24], domain: "mine"> Layer (q, k, n) => (o) { o = Attention(q, k, k,,,, n) }
        """
    )
    assert [finding.verdict for finding in found("attention_length", lint_tensorrt(model))] == ["wrong"]


def test_plugins_that_were_asked_for_are_known():
    case = next(case for case in CASES if case.rule == "plugin_needed" and case.verdict)
    assert lint_tensorrt(case.model(), plugins=["Twice"]) == []
    hidden = next(case for case in CASES if case.rule == "not_lowered" and case.verdict)
    assert [found.rule for found in lint_tensorrt(hidden.model(), plugins=["Twice"])] == ["plugin_hidden_by_function"]


def external(location: str, *, offset: int = 0, length: int = 16) -> onnx.ModelProto:
    """y = x + w, with the four floats of w elsewhere."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24]> g (float[4] x) => (float[4] y) <float[4] w> { y = Add(x, w) }'
    )
    del model.graph.value_info[:]
    weight = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=str(value))
    return model


def external_cases(folder: Path) -> dict[str, tuple[onnx.ModelProto, str | None]]:
    """Models with data in files that this writes into `folder`, and what is wrong with each."""
    (folder / "sub").mkdir()
    weights = np.arange(4, dtype=np.float32)
    for name in ("w.bin", "sub/w.bin", "../above.bin"):
        weights.tofile(folder / name)
    weights[:2].tofile(folder / "short.bin")
    return {
        "beside": (external("w.bin"), None),
        "below": (external("sub/w.bin"), None),
        "down and up": (external("sub/../w.bin"), None),
        "absolute": (external(str(folder / "w.bin")), "absolute path"),
        "above": (external("../above.bin"), "above the model's folder"),
        "missing": (external("absent.bin"), "missing"),
        "short": (external("short.bin"), "truncated"),
        "offset": (external("w.bin", offset=8), "truncated"),
        "length": (external("w.bin", length=8), "8 bytes for a tensor of 16"),
        "nowhere": (external(""), "without a location"),
    }


def test_external_data(tmp_path: Path):
    (tmp_path / "model").mkdir()
    for name, (model, fault) in external_cases(tmp_path / "model").items():
        findings = lint_tensorrt(model, folder=tmp_path / "model")
        assert [finding.verdict for finding in findings] == (["blocked"] if fault else []), name
        assert fault is None or fault in findings[0].what


def profile(case: Case, model: onnx.ModelProto) -> dict[str, list[list[int]]] | None:
    """Shapes of the dynamic inputs at the three points of the case's sizes."""
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if case.sizes and any(dim.dim_param for dim in dims):
            shapes[value.name] = [
                [case.sizes[dim.dim_param][point] if dim.dim_param else dim.dim_value for dim in dims]
                for point in range(3)
            ]
    return shapes or None


def grid(count: int) -> dict[str, tuple[onnx.ModelProto, str | None]]:
    """Random shapes of Attention, and of TRT_Attention with lengths, and what `kernel_refusal` says of each."""
    choose = random.Random(0)
    cases = {}
    for number in range(count):
        batch, kv_heads, group = (
            choose.choice([1, 2, 3, 4, 6]),
            choose.choice([1, 1, 2, 3]),
            choose.choice([1, 2, 3, 7]),
        )
        rows, slots = choose.choice([1, 1, 2, 16, 128]), choose.choice([8, 100, 256, 513])
        size = choose.choice([4, 8, 10, 16, 20, 40, 64, 64, 80, 96, 100, 128, 256, 264])
        dtype, mask = choose.choice(["float16", "float16", "float"]), choose.choice(["", "bool", "same"])
        heads = kv_heads * group
        lengths = choose.choice([False, False, True])
        operands, more = "q, k, v", []
        if mask:
            operands, more = "q, k, v, m", [f"{dtype if mask == 'same' else mask}[{rows},{slots}] m"]
        if lengths:
            operands += ",, n" if mask else ",,, n"
            more.append(f"int32[{batch}] n")
        text = (attended if lengths else attend)(
            inputs=operands,
            query=f"{batch},{heads},{rows},{size}",
            keys=f"{batch},{kv_heads},{slots},{size}",
            dtype=dtype,
            more=", ".join(more),
        )
        element = FLOAT if dtype == "float" else FLOAT16
        refusal = kernel_refusal(batch, heads, rows, size, element, bool(mask), mask == "bool", lengths)
        kind = f"{dtype} {mask}{' lengths' if lengths else ''}"
        cases[f"grid {number}: {batch}x{heads}/{kv_heads}x{rows}x{size} over {slots} {kind}"] = (
            Case("attention_kernel", None, text, domains=OWN).model(),
            refusal,
        )
    return cases


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TensorRT-RTX does with every case, by name; all in one child process."""
    if (gap := missing("tensorrt-rtx")) is not None:
        pytest.skip(f"rules are not compared with TensorRT-RTX: {gap}")
    folder = tmp_path_factory.mktemp("lint") / "models"
    folder.mkdir()
    models = {name: (case.model(), profile(case, case.model())) for name, case in UNIQUE.items()}
    models |= {f"external {name}": (model, None) for name, (model, _) in external_cases(folder).items()}
    models |= {name: (model, None) for name, (model, _) in grid(250).items()}
    requests = {}
    for number, (name, (model, shapes)) in enumerate(models.items()):
        path = folder / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        requests[name] = {"path": str(path), "profile": shapes}
    (folder / "requests.json").write_text(json.dumps(requests))
    with library_environment("tensorrt-rtx") as environment:
        command = [sys.executable, str(WORKER), str(folder / "requests.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_blocked_is_refused_and_the_rest_builds(built: dict[str, Any]):
    """Blocked models do not build; wrong ones do, which is why a lint is needed; so do slow and clean ones."""
    counts: Counter[str] = Counter()
    mistakes = []
    for name, case in UNIQUE.items():
        blocked = any(finding.verdict == "blocked" for finding in lint_tensorrt(case.model()))
        refused = built[name]["result"] != "built"
        counts[f"{case.verdict or 'clean'}: {'refused' if refused else 'built'}"] += 1
        expected = blocked or not case.buildable
        if refused != expected:
            mistakes.append((name, built[name]))
    print("\n" + "\n".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    assert not mistakes
    assert counts["wrong: built"] > 0 and counts["wrong: refused"] == 0 and counts["blocked: built"] == 0


def test_what_is_wrong_is_not_in_the_network(built: dict[str, Any]):
    """A function in place of a plugin, Add in place of foo.Add, float32 in place of double."""
    names = {case.name: name for name, case in UNIQUE.items()}
    for case in ("plugin_hidden_by_function-wrong", "plugin_hidden_by_function-wrong-version"):
        assert built[names[case]]["layers"] == ["ELEMENTWISE"]
    assert set(built[names["double_input-wrong"]]["inputs"]) == {"FLOAT"}
    with_length, without = (built[names[f"attention_length-{kind}"]]["layers"] for kind in ("wrong", "clean"))
    assert with_length == without
    assert built[names["attention_shared_keys-blocked-keys"]]["result"] == "crashed"


def test_external_data_is_refused_or_taken(built: dict[str, Any], tmp_path: Path):
    (tmp_path / "model").mkdir()
    for name, (_, fault) in external_cases(tmp_path / "model").items():
        assert (built[f"external {name}"]["result"] == "built") == (fault is None), (name, built[f"external {name}"])


def test_kernel_rule_on_random_shapes(built: dict[str, Any]):
    """Precision and recall of `attention_kernel` over random shapes for SM86."""
    counts: Counter[str] = Counter()
    mistakes = []
    for name, (_, refusal) in grid(250).items():
        refused = built[name]["result"] != "built"
        kind = {(True, True): "hit", (False, False): "clean", (True, False): "false alarm", (False, True): "miss"}
        counts[kind[refusal is not None, refused]] += 1
        if (refusal is not None) != refused:
            mistakes.append((name, refusal, built[name]["why"][:120]))
    precision = counts["hit"] / (counts["hit"] + counts["false alarm"])
    recall = counts["hit"] / (counts["hit"] + counts["miss"])
    shapes = sum(counts.values())
    print(f"\nattention_kernel over {shapes} shapes: precision {precision:.3f}, recall {recall:.3f}, {counts}")
    assert not mistakes


def test_unknown_operators_are_those_of_the_importer():
    if (gap := missing("tensorrt-rtx")) is not None:
        pytest.skip(f"operators are not compared with TensorRT-RTX: {gap}")
    code = (
        "import json, onnx, tensorrt_rtx_bindings as trt\n"
        "logger = trt.Logger(trt.Logger.ERROR); builder = trt.Builder(logger)\n"
        "parser = trt.OnnxParser(builder.create_network(0), logger)\n"
        "names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ''}\n"
        "print(json.dumps(sorted(name for name in names if not parser.supports_operator(name))))"
    )
    with library_environment("tensorrt-rtx") as environment:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert set(json.loads(done.stdout.splitlines()[-1])) == UNKNOWN_STANDARD & names

"""The files of an export: what the graph takes and gives, how it is stored, and the same bytes from the same model."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx.checker
import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.export import export_checkpoint
from semkv_deploy.export.decoder import ReferenceDecoder, cache_names, present_names
from semkv_deploy.lint.aliases import prefixes
from semkv_deploy.model.config import ModelFacts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def other_process(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that exports the same checkpoint meanwhile, with another hash seed and working directory."""
    out = tmp_path_factory.mktemp("elsewhere")
    code = (
        "import sys, pathlib; from semkv_deploy.export import export_checkpoint; "
        "export_checkpoint(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_checkpoint), str(out)], cwd=out, env=environment
    ) as process:
        yield process, out
        process.kill()


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, other_process: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama (2 layers, 4 heads over 2 KV heads of 16, vocabulary 512, head not tied)."""
    out = tmp_path_factory.mktemp("exported")
    export_checkpoint(str(tiny_checkpoint), out)
    return out


@pytest.fixture(scope="module")
def model(exported: Path) -> onnx.ModelProto:
    return onnx.load(exported / "decoder.onnx", load_external_data=False)


@pytest.mark.parametrize(("layers", "digits"), [(1, 2), (2, 2), (100, 2), (101, 3), (1000, 3), (1001, 4)])
def test_no_state_name_is_a_prefix_of_another(layers: int, digits: int):
    """Servers that match state by prefix would swap the two."""
    names = [name for i in range(layers) for name in (*cache_names(i, layers), *present_names(i, layers))]
    assert len(set(names)) == 5 * layers and not prefixes(names)
    assert names[2] == "slot_bias." + "0" * digits


def signature(values: Any) -> dict[str, list[str | int]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def test_inputs_and_outputs(model: onnx.ModelProto) -> None:
    cache, bias = ["batch", 2, "capacity", 16], ["batch", 2, "capacity"]
    assert list(signature(model.graph.input).items()) == [
        ("input_ids", ["batch", "sequence"]),
        ("position_ids", ["batch", "sequence"]),
        ("logits_index", ["batch", "rows"]),
        ("length", [2, "batch"]),
        ("past_key_values.00.key", cache),
        ("past_key_values.00.value", cache),
        ("slot_bias.00", bias),
        ("past_key_values.01.key", cache),
        ("past_key_values.01.value", cache),
        ("slot_bias.01", bias),
    ]
    assert list(signature(model.graph.output).items()) == [
        ("logits", ["batch", "rows", 512]),
        ("present.00.key", cache),
        ("present.00.value", cache),
        ("present.01.key", cache),
        ("present.01.value", cache),
    ]
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    integers = {"input_ids", "position_ids", "logits_index", "length"}
    assert {name for name, kind in types.items() if kind == onnx.TensorProto.INT64} == integers
    assert {kind for name, kind in types.items() if name not in integers} == {onnx.TensorProto.FLOAT}


def test_graph_is_valid_and_carries_its_operator(exported: Path, model: onnx.ModelProto) -> None:
    onnx.checker.check_model(exported / "decoder.onnx", full_check=True)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 24), ("semkv", 1)}
    assert [(f.domain, f.name) for f in model.functions] == [("semkv", "NexusAttention")]


def test_no_size_is_computed(model: onnx.ModelProto) -> None:
    """A pass may then fold batch into heads in the caches without the rest of the graph noticing."""
    assert not [node.name for node in model.graph.node if node.op_type in ("Shape", "Size")]
    sizes = {dim for value in model.graph.value_info for dim in signature([value])[value.name]}
    assert {size for size in sizes if isinstance(size, str)} <= {"batch", "sequence", "rows", "capacity"}


def test_positions_come_from_position_ids_only(model: onnx.ModelProto) -> None:
    """`length` reaches attention and nothing else: the position is never the length."""
    readers = [node for node in model.graph.node if "length" in node.input]
    assert {node.op_type for node in readers} == {"Gather"}
    after = {name for node in readers for name in node.output}
    assert {n.op_type for n in model.graph.node if after & set(n.input)} == {"NexusAttention"}


def test_head_sees_the_wanted_rows_only(exported: Path, tiny_checkpoint: Path, open_onnx: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    decoder = ReferenceDecoder(AutoModelForCausalLM.from_pretrained(tiny_checkpoint))
    run = open_onnx(exported / "decoder.onnx")
    step = {
        "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]),
        "position_ids": torch.arange(4).repeat(2, 1),
        "length": torch.zeros(2, 2, dtype=torch.int64),
        **decoder.empty_caches(2, 8),
    }
    every = run({**step, "logits_index": torch.arange(4).repeat(2, 1)})["logits"]
    some = run({**step, "logits_index": torch.tensor([[3, 0], [1, 1]])})["logits"]
    assert torch.allclose(some, torch.stack((every[0, [3, 0]], every[1, [1, 1]])), atol=1e-5)


def test_weights_are_in_one_relative_aligned_file(exported: Path, model: onnx.ModelProto) -> None:
    end, seen = 0, 0
    for tensor in model.graph.initializer:
        record = {entry.key: entry.value for entry in tensor.external_data}
        if not record:
            assert len(tensor.raw_data) < 1024
            continue
        assert record["location"] == "decoder.onnx.data"
        assert int(record["offset"]) % 4096 == 0
        end, seen = max(end, int(record["offset"]) + int(record["length"])), seen + 1
    assert seen == 2 + 7 * 2
    assert (exported / "decoder.onnx.data").stat().st_size == end


def test_nothing_is_dead_and_every_name_means_something(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    assert not {tensor.name for tensor in model.graph.initializer} - used
    assert not [node.name for node in model.graph.node if not set(node.output) & used]
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))
    assert "layers.01.mlp.down_proj/MatMul" in names
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert weights["layers.01.mlp.down_proj.weight"] == [128, 64]
    assert not [name for name in names if name.startswith(("node_", "val_"))]


def test_no_trace_of_the_machine(exported: Path, tiny_checkpoint: Path) -> None:
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert {path.relative_to(exported).parts[0] for path in files} == {
        "decoder.onnx",
        "decoder.onnx.data",
        "delimiters.json",
        "model.json",
        "tokenizer",
    }
    for path in files:
        content = path.read_bytes()
        for trace in (str(ROOT), str(tiny_checkpoint.parent), sys.prefix, "site-packages", ".py:", "stack_trace"):
            assert trace.encode() not in content, (path, trace)


def test_same_bytes_from_another_process(exported: Path, other_process: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, out = other_process
    assert process.wait(timeout=120) == 0
    ours = sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    theirs = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert ours == theirs
    assert not filecmp.cmpfiles(exported, out, [str(path) for path in ours], shallow=False)[1]


def test_tied_head_is_stored_once_and_transposed_by_the_runtime(
    exported_family: Callable[[str], Any], tmp_path: Path
) -> None:
    """ONNX Runtime folds the transpose when it loads the model, so no step pays for it."""
    import onnxruntime

    tied = exported_family("llama").path
    graph = onnx.load(tied, load_external_data=False).graph
    wide = [tensor.name for tensor in graph.initializer if 97 in tensor.dims]
    assert wide == ["lm_head.weight"]
    assert {node.op_type for node in graph.node if "lm_head.weight" in node.input} == {"Gather", "Transpose"}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tied), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    stored = {tensor.name for tensor in optimized.initializer}
    assert not [node for node in optimized.node if node.op_type == "Transpose" and set(node.input) & stored]


def test_facts_describe_the_model(exported: Path) -> None:
    facts = ModelFacts.read(exported / "model.json")
    shape = (facts.layers, facts.query_heads, facts.kv_heads, facts.head_dim, facts.hidden_size, facts.vocab_size)
    assert shape == (2, 4, 2, 16, 64, 512)
    assert (facts.family, facts.max_position, facts.dtype, facts.windows) == ("llama", 512, "float32", (0, 0))
    assert facts.eos_token_ids == (1,)
    assert "/" not in facts.source
    assert facts.rotary is not None and facts.rotary.dim == 16


def test_tokenizer_comes_along(exported: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported / "tokenizer")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n"


def test_directory_must_be_empty(exported: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for out in (exported, tmp_path / "missing"):
        with pytest.raises(SemkvError, match="must exist and be empty"):
            export_checkpoint(str(tiny_checkpoint), out)


def test_compressor_goes_beside_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import semkv_deploy.export as frontend

    facts = object()

    def write_decoder(source: str, out: Path, progress: Any) -> Any:
        (out / "decoder.onnx").write_text(source)
        return facts

    monkeypatch.setattr(frontend, "export_checkpoint", write_decoder)
    compressor = onnx.ModelProto(producer_name="compressor")
    for given in (compressor, None):
        out = tmp_path / str(given is None)
        method: Any = SimpleNamespace(
            compresses=given is not None,
            compressor=lambda asked, given=given: given if asked is facts else 1 / 0,
        )
        assert frontend.export_model("source", out, method) is facts
        assert (out / "decoder.onnx").read_text() == "source"
        assert (out / "compressor.onnx").exists() == (given is not None)


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    from semkv_deploy.export import export_model

    method: Any = SimpleNamespace(compressor=None)
    with pytest.raises(SemkvError, match="no such checkpoint"):
        export_model("/nowhere/model", tmp_path / "out", method)
    assert not list(tmp_path.iterdir())

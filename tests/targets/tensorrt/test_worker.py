"""Engines built on the CPU by TensorRT-RTX, in the child process. Skipped where TensorRT-RTX is not installed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.tensorrt import builder as module
from semkv_deploy.targets.tensorrt.api import RTX_COMPUTE_CAPABILITIES, find_gpu, installed_version, runtime_module
from semkv_deploy.targets.tensorrt.builder import build_engine, list_creators, run_worker
from semkv_deploy.targets.tensorrt.plan_file import read_header
from semkv_deploy.targets.tensorrt.request import EngineRequest

from .conftest import ALIASES, KEYS, PROMISED, QUERY, decoder_layer, plugin_layer, with_external_weights


def refused(request: EngineRequest, *words: str) -> SemkvError:
    """The build fails with one error that has these words, and leaves nothing beside the plan."""
    with pytest.raises(SemkvError) as caught:
        build_engine(request)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert not request.plan.parent.exists() or not list(request.plan.parent.iterdir())
    return caught.value


def test_one_plan_for_three_gpus_is_built_and_proved(request_: EngineRequest) -> None:
    told: list[tuple[str, float | None]] = []
    result = build_engine(request_, lambda what, share: told.append((what, share)))
    assert request_.plan.stat().st_size == result.bytes and [p.name for p in request_.plan.parent.iterdir()] == [
        "decoder.0.5.plan"
    ]
    assert result.layer_kinds["KV_CACHE_UPDATE"] == 2 and result.layer_kinds["ATTENTION_INPUT"] == 1
    assert result.proved.per_layer() == {"layers.00": {"KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1}}
    assert result.proved.aliases == ALIASES
    assert read_header(request_.plan) == ("tensorrt-rtx", result.version)
    assert result.version == installed_version("tensorrt-rtx")
    assert result.weight_bytes == 0 and result.peak_rss > 100 << 20
    assert result.timing_cache == "none asked for"
    assert result.warnings == [] and not result.from_cache and 0 < result.seconds < 60
    assert told[0] == ("parsing", None)
    shares = [share for what, share in told if what == "building" and share is not None]
    assert shares and shares == sorted(shares) and 0 <= shares[-1] <= 1


def test_an_engine_for_fewer_gpus_is_another(request_: EngineRequest) -> None:
    three = build_engine(request_)
    one = build_engine(request_.model_copy(update={"compute_capabilities": [86]}))
    assert one.bytes < three.bytes  # one plan holds portable code; the list of GPUs is the difference


def test_the_compute_capabilities_known_here_are_the_enums() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    assert sorted(int(name[2:]) for name in names) == sorted(RTX_COMPUTE_CAPABILITIES)
    assert runtime_module("tensorrt-rtx") is trt


def test_peak_memory_is_the_childs_and_not_the_parents(request_: EngineRequest) -> None:
    """getrusage says at least as much as the parent has when it forks."""
    ballast = np.ones(700 << 20, np.uint8)
    result = build_engine(request_)
    assert 20 << 20 < result.peak_rss < 600 << 20 < ballast.nbytes


def test_weights_in_external_data(request_: EngineRequest) -> None:
    with_external_weights(decoder_layer(), request_.onnx)
    data = Path(f"{request_.onnx}.data")
    assert build_engine(request_).bytes > 0
    content = data.read_bytes()
    request_.plan.unlink()
    data.write_bytes(content[:-1])
    refused(request_, "decoder.0.5.onnx.data", "truncated", f"at least {len(content)} bytes")
    data.unlink()
    refused(request_, "decoder.0.5.onnx.data", "external data of decoder.0.5.onnx is missing")


def test_files_that_are_no_graphs(request_: EngineRequest) -> None:
    request_.onnx.write_text("no graph")
    refused(request_, "decoder.0.5.onnx", "not an ONNX model")
    request_.onnx.unlink()
    refused(request_, "decoder.0.5.onnx", "no such file")


@pytest.mark.parametrize(
    "update, words",
    [
        ({"compute_capabilities": [86, 90]}, ["no Hopper", "got 90", "target tensorrt"]),
        ({"profiles": []}, ["input query is dynamic", "no optimization profile"]),
        ({"profiles": [KEYS]}, ["profile 0", "no shapes for dynamic input query"]),
        ({"profiles": [QUERY | KEYS | {"quer": QUERY["query"]}]}, ["no input quer"]),
        ({"profiles": [KEYS | {"query": ((1, 9, 2, 64), (1, 9, 1, 64), (1, 9, 4, 64))}]}, ["query do not ascend"]),
        ({"profiles": [KEYS | {"query": ((1, 8, 1, 64),) * 3}]}, ["does not fit input query", "(1, 8, 1, 64)"]),
        ({"profiles": [KEYS | {"query": ((1, 9, 1),) * 3}]}, ["does not fit input query"]),
        ({"promised": [*PROMISED, ("KV_CACHE_UPDATE", "layers.01.key_append")]}, ["layers.01.key_append"]),
        ({"promised": PROMISED[1:]}, ["layers.00.key_append", "did not promise"]),
        ({"promised": [("ATTENTION_INPUT", "other.3"), *PROMISED]}, ["node other.3", "1 SHUFFLE"]),
        ({"aliases": {}}, ["layers.00.key_append", "gives it as another"]),
        ({"embed_plugins": True}, ["no library to embed"]),
        ({"plugin_library": Path("absent.so")}, ["absent.so", "no such file"]),
        ({"plugins": ["NexusAttention"]}, ["no plugin NexusAttention", "semkv::NexusAttention 1", "ROIAlign_TRT"]),
    ],
)
def test_bad_requests(request_: EngineRequest, update: dict[str, Any], words: list[str]) -> None:
    refused(request_.model_copy(update=update), *words)


def test_an_input_that_the_importer_ignores(request_: EngineRequest) -> None:
    """nonpad_kv_seqlen is dropped without an error: attention would see padding."""
    model = decoder_layer(attention=", , , lengths", extra_input=", int64[3] lengths")
    onnx.save(model, request_.onnx)
    refused(request_, "ignores the input lengths", "nonpad_kv_seqlen", "mask")


def test_a_node_that_the_importer_refuses(request_: EngineRequest) -> None:
    model = decoder_layer()
    append = next(node for node in model.graph.node if node.name == "layers.00.key_append")
    del append.attribute[:]
    append.attribute.extend([helper.make_attribute("axis", -2), helper.make_attribute("mode", "circular")])
    onnx.save(model, request_.onnx)
    refused(request_, "refuses node layers.00.key_append (TensorScatter)", "circular", "linear mode")


def test_a_capacity_that_is_dynamic(request_: EngineRequest) -> None:
    onnx.save(decoder_layer(capacity="slots"), request_.onnx)
    refused(request_, "refuses node layers.00.key_append (TensorScatter)", "static capacity")


def test_an_append_whose_result_is_swapped(request_: EngineRequest) -> None:
    model = decoder_layer()
    key, value = (next(n for n in model.graph.node if n.name == f"layers.00.{p}_append") for p in ("key", "value"))
    key.output[0], value.output[0] = value.output[0], key.output[0]
    onnx.save(model, request_.onnx)
    refused(request_, "layers.00.key_append", "past_key -> present_value")


def test_attention_that_has_no_kernel(request_: EngineRequest) -> None:
    """One query head and several rows: it parses, and no kernel takes it."""
    text = """<ir_version: 10, opset_import: ["": 24]>
    g (float16[3,1,8,64] q, float16[3,1,256,64] k, float16[3,1,256,64] v, float16[3,1,1,256] mask)
        => (float16[3,1,8,64] o) {
        o = Attention(q, k, v, mask)
    }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name = "layers.00.attention"
    onnx.save(model, request_.onnx)
    update = {"profiles": [], "promised": [("ATTENTION_INPUT", "layers.00.attention")], "aliases": {}}
    refused(request_.model_copy(update=update), "could not build", "dedicated kernel", "inspect --lint")


def test_plugin_asked_for_and_not_there(plugin_request: EngineRequest) -> None:
    refused(plugin_request, "no plugin Append is registered", "expected semkv::Append 1", "ROIAlign_TRT")
    without_asking = plugin_request.model_copy(update={"plugins": []})
    refused(without_asking, "refuses node layers.00.attention (Append)", "Plugin not found", "--plugin-library")


def test_function_inlined_in_place_of_a_plugin(plugin_request: EngineRequest) -> None:
    """TensorRT says nothing of it."""
    onnx.save(plugin_layer(function=True), plugin_request.onnx)
    inlined = plugin_request.model_copy(update={"plugins": []})
    refused(inlined, "inlined the function body of node layers.00.attention", "--plugin-library", "1 ELEMENTWISE")


def test_plugin_in_the_engine(plugin_request: EngineRequest, plugin_library: Path) -> None:
    loaded = plugin_request.model_copy(update={"plugin_library": plugin_library})
    onnx.save(plugin_layer(function=True), loaded.onnx)
    result = build_engine(loaded)
    assert result.layer_kinds == {"PLUGIN_V3": 1} and result.proved.kinds == {"PLUGIN_V3": 1}
    assert result.proved.plugin_aliases == {"past_key": "present_key"}
    assert result.proved.aliases == {}
    embedded = build_engine(loaded.model_copy(update={"embed_plugins": True}))
    assert embedded.bytes > result.bytes + 0.9 * plugin_library.stat().st_size


def test_plugin_that_nobody_promised(plugin_request: EngineRequest, plugin_library: Path) -> None:
    update = {"plugin_library": plugin_library, "promised": [], "aliases": {}}
    refused(plugin_request.model_copy(update=update), "PLUGIN_V3", "did not promise", "semkv::Append")


def test_creators_of_a_library(request_: EngineRequest, plugin_library: Path, tmp_path: Path) -> None:
    assert list_creators("tensorrt-rtx", plugin_library) == ["semkv::Append 1"]
    broken = tmp_path / "libbroken.so"
    broken.write_text("no library")
    with pytest.raises(SemkvError, match=r"libbroken\.so: TensorRT does not load the plugin library .* file too short"):
        list_creators("tensorrt-rtx", broken)


def test_without_the_library_name_the_process_aborts_and_says_so(
    plugin_request: EngineRequest, plugin_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `library_environment` is for; the abort is TensorRT-RTX's own."""
    from semkv_deploy.targets.tensorrt.api import rtx_library_folder

    if rtx_library_folder() is None:
        pytest.skip("this TensorRT-RTX has its unversioned library")
    monkeypatch.setattr(module, "library_environment", lambda runtime: contextlib.nullcontext(dict(os.environ)))
    loaded = plugin_request.model_copy(update={"plugin_library": plugin_library})
    refused(loaded, "process died", "SIGABRT", "terminate called")


@pytest.mark.parametrize("flag", ["REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"])
def test_engines_cannot_share_weights_without_a_gpu(request_: EngineRequest, flag: str) -> None:
    """Why each engine holds its own: plans whose weights come from elsewhere are made with a GPU only."""
    if find_gpu()[0] is not None:
        pytest.skip("there is a GPU here")
    with_external_weights(decoder_layer(), request_.onnx)
    code = f"""
import tensorrt_rtx_bindings as trt
builder = trt.Builder(logger := trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
assert trt.OnnxParser(network, logger).parse_from_file({str(request_.onnx)!r})
for flags in ([], [trt.BuilderFlag.{flag}]):
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for name, shapes in {QUERY | KEYS}.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    for each in flags:
        config.set_flag(each)
    print("plan" if builder.build_serialized_network(network, config) else "none")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line in ("plan", "none")] == ["plan", "none"]


def test_child_that_dies_before_it_reads(request_: EngineRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than a pipe holds, so that writing to it fails."""
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    many = [("KV_CACHE_UPDATE", f"layers.{number}") for number in range(20000)]
    refused(request_.model_copy(update={"promised": many}), "process died", "exit code 1")


def kill_child(number: signal.Signals) -> None:
    for child in psutil.Process().children():
        if "semkv_deploy.targets.tensorrt.worker" in child.cmdline():
            child.send_signal(number)


@pytest.mark.parametrize("number, words", [(signal.SIGKILL, "more memory"), (signal.SIGSEGV, "report this")])
def test_killed_child(request_: EngineRequest, number: signal.Signals, words: str) -> None:
    def progress(what: str, share: float | None) -> None:
        if what == "parsing":
            kill_child(number)

    with pytest.raises(SemkvError) as caught:
        build_engine(request_, progress)
    assert number.name in str(caught.value) and words in str(caught.value).lower()
    assert not list(request_.plan.parent.iterdir())


def test_interrupt_ends_the_child_and_leaves_nothing(request_: EngineRequest) -> None:
    def progress(what: str, share: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(request_, progress)
    assert not [c for c in psutil.Process().children() if "tensorrt.worker" in " ".join(c.cmdline())]
    assert not list(request_.plan.parent.iterdir())


def test_a_plan_that_was_there_survives_a_failed_build(request_: EngineRequest) -> None:
    request_.plan.parent.mkdir()
    request_.plan.write_bytes(b"earlier")
    with pytest.raises(SemkvError):
        build_engine(request_.model_copy(update={"promised": []}))
    assert request_.plan.read_bytes() == b"earlier"


def test_timing_cache_is_not_claimed_for_rtx(request_: EngineRequest, tmp_path: Path) -> None:
    result = build_engine(request_.model_copy(update={"timing_cache": tmp_path / "timing"}))
    assert "times no kernels" in result.timing_cache and not (tmp_path / "timing").exists()


def test_target_tensorrt_is_the_same_code(
    request_: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker for `tensorrt`, on a module of that name that is TensorRT-RTX: TensorRT itself needs a GPU."""
    package = tmp_path / "modules" / "tensorrt"
    package.mkdir(parents=True)
    lines = "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
    (package / "__init__.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    timing = tmp_path / "timing" / "cache"
    update = {"runtime": "tensorrt", "compute_capabilities": [86], "timing_cache": timing}
    request_.plan.parent.mkdir()
    request = request_.model_copy(update=update)
    first = run_worker(request, lambda what, share: None)
    assert first.proved.kinds == {"KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1} and first.timing_cache == "written"
    assert timing.stat().st_size > 0
    assert run_worker(request, lambda what, share: None).timing_cache == "read and written"
    timing.write_bytes(b"of another version")
    again = run_worker(request, lambda what, share: None).timing_cache
    assert re.match(r"read and written|written anew", again)


def test_memory_limit_reaches_the_builder(request_: EngineRequest) -> None:
    """The plan records it; the layer fits either way."""
    build_engine(request_.model_copy(update={"memory_limit": 3 << 20}))
    assert f"memory_budget = {3 << 20}".encode() in request_.plan.read_bytes()

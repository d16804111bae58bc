"""The engine that runs plans, on the host: TensorRT's execution API and CUDA's memory are faked, nothing else is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_tensorrt import FakeTensorRT, HostCuda, graphs_of

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import SemantiCache
from semkv_deploy.model.cache_groups import GroupShare
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine
from semkv_deploy.targets.tensorrt.api import Gpu, missing
from semkv_deploy.targets.tensorrt.build import TensorRTOptions

TARGET = "tensorrt-rtx"
LAYOUTS = [("dual", 1, "float16"), ("dual", 2, "float32"), ("single", 2, "float16"), ("split", 2, "float16")]


def build(export: Path, out: Path, layout: Any, batch: int, dtype: Any, **options: Any) -> Bundle:
    """Budget 0.25 of 512 tokens."""
    return build_bundle(
        str(export / "decoder.onnx"),
        out,
        budgets=[0.25],
        method=SemantiCache(ladder="paper", threshold=0.3),
        target=TARGET,
        tensorrt=TensorRTOptions(layout=layout, batch=batch, dtype=dtype, compute_capabilities="86", **options),
    )


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda each: "-".join(map(str, each)))
def built(request: Any, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Real engines for SM86."""
    if gap := missing("tensorrt-rtx"):
        pytest.skip(gap)
    return build(tiny_export, tmp_path_factory.mktemp("engine") / "bundle", *request.param)


@pytest.fixture
def gpu(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return fake(monkeypatch, built)


def fake(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, compute_capability: int = 86) -> FakeTensorRT:
    import polygraphy.cuda.cuda as polygraphy_cuda
    from polygraphy import cuda

    from semkv_deploy.targets.tensorrt import engine as tensorrt_engine

    host = HostCuda()
    module = FakeTensorRT(host, graphs_of(bundle, TARGET))
    for each in (polygraphy_cuda, cuda):
        monkeypatch.setattr(each, "wrapper", lambda: host)
    monkeypatch.setattr(tensorrt_engine, "runtime_module", lambda runtime: module)
    monkeypatch.setattr(tensorrt_engine, "find_gpu", lambda: (Gpu("a GPU", compute_capability), None))
    return module


def contract_of(bundle: Bundle) -> Any:
    return bundle.target(TARGET).budgets[0].contract


@pytest.fixture
def in_onnxruntime(built: Bundle, tiny_export: Path, tmp_path: Path) -> Session:
    """The same model's graph that takes any rows, run by the engine of the CPU targets."""
    contract, bundle = contract_of(built), built
    if contract.engine_layout == "split":
        bundle = build(tiny_export, tmp_path / "dual", "dual", contract.batch, contract.dtype, engines=False)
    return Session(OnnxRuntimeEngine(bundle.built(TARGET), batch=contract.batch))


def test_three_turns_as_in_onnxruntime(built: Bundle, gpu: FakeTensorRT, in_onnxruntime: Session):
    """Ragged rows, prompts in pieces, steps, compression in between: logits, lengths, slots, caches."""
    batch, theirs = contract_of(built).batch, in_onnxruntime
    ours = open_session(built, target=TARGET, batch=batch)
    random = np.random.default_rng(3)
    for tokens in (90, 150, 60):
        prompt = [random.integers(2, 512, int(tokens * 0.7**row)).tolist() for row in range(batch)]
        found, expected = ours.prefill(prompt), theirs.prefill(prompt)
        for _ in range(6):
            np.testing.assert_array_equal(found, expected)
            chosen = expected.argmax(-1)
            found, expected = ours.step(chosen).copy(), theirs.step(chosen).copy()
        np.testing.assert_array_equal(ours.length, theirs.length)
        for group in range(len(ours.length)):
            np.testing.assert_array_equal(ours.slot_position[group], theirs.slot_position[group])
            for name in ("key", "value", "slot_bias"):
                np.testing.assert_array_equal(ours.engine.read(name, group), theirs.engine.read(name, group))
    assert ours.stats.runs == theirs.stats.runs >= 2
    runs = {
        "dual": {("decoder", 0), ("decoder", 1)},
        "single": {("decoder", 0)},
        "split": {("prefill", 0), ("decode", 0)},
    }
    assert set(gpu.runs) == runs[contract_of(built).engine_layout] | {("compressor", 0)}


def test_a_new_conversation_starts_like_the_first(built: Bundle, gpu: FakeTensorRT):
    session = open_session(built, target=TARGET, batch=contract_of(built).batch)
    prompt = [list(range(2, 150))] * session.batch
    first = session.generate(prompt, max_new_tokens=8)
    session.reset()
    assert session.generate(prompt, max_new_tokens=8) == first


def test_profiles_are_for_what_they_were_tuned(built: Bundle, gpu: FakeTensorRT):
    """Prompts never run in the decode profile, steps never in that of prefill."""
    session = open_session(built, target=TARGET, batch=contract_of(built).batch)
    logits = session.prefill([[5, 6, 7]] * session.batch)
    prompts, gpu.runs[:] = set(gpu.runs), []
    session.step(logits.argmax(-1))
    steps = set(gpu.runs)
    expected = {
        "dual": ({("decoder", 0)}, {("decoder", 1)}),
        "single": ({("decoder", 0)}, {("decoder", 0)}),
        "split": ({("prefill", 0)}, {("decode", 0)}),
    }
    assert (prompts, steps) == expected[contract_of(built).engine_layout]


def test_memory_is_what_the_contract_says(built: Bundle, gpu: FakeTensorRT):
    session, contract = open_session(built, target=TARGET, batch=contract_of(built).batch), contract_of(built)
    biases = contract.layers * contract.batch * contract.kv_heads * contract.capacity * 4
    layers = contract.layers + 1  # a spare one
    assert session.engine.cache_bytes() == (contract.cache_bytes() + biases) // contract.layers * layers
    held = sum(len(block) for block in gpu.cuda.blocks.values())
    assert held == session.engine.cache_bytes()  # nothing else until something runs


def test_validate_runs_the_engines_where_they_run(built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """And one that computes something else fails."""
    import onnx

    from semkv_deploy.targets import TO_RUN
    from semkv_deploy.validate.run import validate

    monkeypatch.setitem(TO_RUN, TARGET, lambda: None)
    module = fake(monkeypatch, built)
    (result,) = (each for each in validate(built.root).results if each.name == "engines")
    assert result.status == "passed" and result.events > 20 and result.compressions >= 3, result.sentence()
    assert {phase for phase, _ in module.runs} == {graph.phase for graph in contract_of(built).graphs}
    for key, (contract, path) in module.graphs.items():
        if contract.phase == "compressor":
            continue
        wrong = onnx.load(path, load_external_data=False)
        for node in wrong.graph.node:
            if "position_ids" in node.input:
                node.input[list(node.input).index("position_ids")] = "late"
        wrong.graph.node.insert(0, onnx.helper.make_node("Add", ["position_ids", "position_ids"], ["late"]))
        # Elsewhere: a bundle with files that it does not list is refused.
        broken = tmp_path / path.name
        onnx.save(wrong, broken)
        shutil.copy(path.parent / "decoder.onnx.data", tmp_path)
        module.graphs[key] = (contract, broken)
    report = validate(built.root)
    assert [each.name for each in report.results if each.status == "failed"] == ["engines"]


def test_refusals(built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    batch = contract_of(built).batch
    fake(monkeypatch, built)
    with pytest.raises(SemkvError, match=f"take another batch .*expected {batch} rows, got {batch + 1}"):
        open_session(built, target=TARGET, batch=batch + 1)
    fake(monkeypatch, built, compute_capability=89)
    with pytest.raises(SemkvError, match=r"for other GPUs .*expected SM86, got SM89 \(a GPU\)"):
        open_session(built, target=TARGET, batch=batch)
    module = fake(monkeypatch, built)
    module.graphs.clear()
    with pytest.raises(SemkvError, match="TensorRT-RTX does not open the engine"):
        open_session(built, target=TARGET, batch=batch)


def test_an_engine_that_is_not_the_contracts_is_refused(built: Bundle, monkeypatch: pytest.MonkeyPatch):
    module = fake(monkeypatch, built)
    for key, (contract, graph) in module.graphs.items():
        if contract.aliases:
            names = list(contract.aliases)
            swapped = {names[0]: contract.aliases[names[1]], names[1]: contract.aliases[names[0]]}
            aliases = {**contract.aliases, **swapped}
            module.graphs[key] = (contract.model_copy(update={"aliases": aliases}), graph)
    with pytest.raises(SemkvError, match="the engine aliases other tensors than the contract"):
        open_session(built, target=TARGET, batch=contract_of(built).batch)
    module = fake(monkeypatch, built)
    for key, (contract, graph) in module.graphs.items():
        module.graphs[key] = (contract.model_copy(update={"inputs": contract.inputs[1:]}), graph)
    with pytest.raises(SemkvError, match=r"the engine is not the contract's .*input_ids"):
        open_session(built, target=TARGET, batch=contract_of(built).batch)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cache_groups_of_any_size_run_and_are_saved(
    dtype: Any, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Capacities by head: as in ONNX Runtime, before and after a session is saved and loaded."""
    if gap := missing("tensorrt-rtx"):
        pytest.skip(gap)
    groups = (
        GroupShare(layer=0, heads=(0, 1)),
        GroupShare(layer=1, heads=(0,), share=1.5),
        GroupShare(layer=1, heads=(1,), share=0.6),
    )
    bundle = build_bundle(
        str(tiny_export / "decoder.onnx"),
        tmp_path / "bundle",
        budgets=[0.5],
        method=SemantiCache(),
        groups=groups,
        target=TARGET,
        tensorrt=TensorRTOptions(batch=2, dtype=dtype, compute_capabilities="86"),
    )
    fake(monkeypatch, bundle)
    ours, theirs = (
        open_session(bundle, target=TARGET, batch=2),
        Session(OnnxRuntimeEngine(bundle.built(TARGET), batch=2)),
    )
    random = np.random.default_rng(5)
    for tokens in (150, 120):
        prompt = [random.integers(2, 512, tokens - 30 * row).tolist() for row in range(2)]
        assert ours.generate(prompt, max_new_tokens=6) == theirs.generate(prompt, max_new_tokens=6)
        for group in range(len(groups)):
            for name in ("key", "value", "slot_bias"):
                np.testing.assert_array_equal(ours.engine.read(name, group), theirs.engine.read(name, group))
    assert ours.stats.runs == theirs.stats.runs >= 2
    ours.save(tmp_path / "state")
    again = open_session(bundle, target=TARGET, batch=2, state=tmp_path / "state")
    prompt = [random.integers(2, 512, 40).tolist() for _ in range(2)]
    assert again.generate(prompt, max_new_tokens=6) == ours.generate(prompt, max_new_tokens=6)

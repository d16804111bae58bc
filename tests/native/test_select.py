"""Selection of blocks on native operators: what is chosen, what it comes to, and a session of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from contract_host import Host

from semkv_deploy import open_bundle, open_session
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import DynSplit, DynSplitSelect, Full, Method
from semkv_deploy.methods.representatives import reference
from semkv_deploy.model.cache_groups import by_layer
from semkv_deploy.ops import semantic_block_select
from semkv_deploy.runtime.session import Session
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from semkv_deploy.validate.run import validate

pytestmark = pytest.mark.usefixtures("installed")

ATTEND = 64
METHODS = {
    "all": DynSplitSelect(attend=512),
    "few": DynSplitSelect(attend=ATTEND),
    "mean": DynSplitSelect(attend=ATTEND, representatives="mean", block=32),
    "radius": DynSplitSelect(attend=ATTEND, representatives="mean_radius"),
}


@pytest.fixture(scope="module")
def bundles(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("select")
    methods: dict[str, Method] = {"full": Full(), **METHODS}
    for name, method in methods.items():
        build: dict[str, Any] = {"budgets": [1.0], "weights": "fp32", "native": "on", "method": method}
        build_bundle(tiny_export / "decoder.onnx", folder / name, **build)
    return {name: folder / name for name in methods}


def text(seed: int, count: int) -> list[int]:
    random = np.random.default_rng(seed)
    return np.where(random.random(count) < 0.1, 13, random.integers(20, 512, count)).tolist()


def opened(root: Path, **options: Any) -> Session:
    return open_session(open_bundle(root), budget=1.0, **options)


def conversation(session: Session) -> np.ndarray:
    seen = [session.prefill([text(1, 130), text(2, 61)]).copy()]
    for token in range(40):
        seen.append(session.step([token + 20, 13 if token % 9 == 0 else token + 30]).copy())
    seen.append(session.prefill([text(3, 40), []]).copy())
    seen.append(session.step([50, 60]).copy())
    return np.stack(seen)


def test_all_blocks_are_full_attention(bundles: dict[str, Path]):
    """As many slots as there are: the same logits within rounding, and the same greedy tokens."""
    ours, full = (opened(bundles[name], batch=2) for name in ("all", "full"))
    np.testing.assert_allclose(conversation(ours), conversation(full), atol=1e-3)
    prompts = [text(4, 90), text(5, 150)]
    first, second = (opened(bundles[name], batch=2).generate(prompts, max_new_tokens=40) for name in ("all", "full"))
    assert first == second


@pytest.mark.parametrize("name", ["few", "mean"])
def test_it_validates(bundles: dict[str, Path], name: str):
    """Native operators against bodies: logits, caches, representatives, columns."""
    assert validate(bundles[name], tokens=250).passed


@pytest.mark.parametrize("name", ["few", "mean", "radius"])
def test_representatives_are_those_of_the_blocks(bundles: dict[str, Path], name: str):
    """Whatever the pieces, in both rows: against the slow statement."""
    import torch

    session = opened(bundles[name], batch=2)
    kind = METHODS[name].representatives
    conversation(session)
    (behaviour,) = session.behaviours
    method = session.contract.behaviours[0]
    for row in range(2):
        closed = behaviour.segmenters[row].closed  # type: ignore[attr-defined]
        ends = behaviour.ends[row, :closed]  # type: ignore[attr-defined]
        starts = np.concatenate([[0], ends[:-1]])
        assert closed > 1 and (np.diff([0, *ends]) <= method.base + method.search).all()  # type: ignore[union-attr]
        for group in range(2):
            keys = torch.from_numpy(session.engine.read("key", group)[row : row + 1])
            found = session.engine.read("representatives", group)[row, :, :closed]
            where = (torch.from_numpy(each[None]) for each in (starts, ends - starts))
            np.testing.assert_allclose(found, reference(kind, keys, *where, 40)[0].numpy(), atol=2e-6)


@pytest.mark.parametrize("fit", ["bias", "all"])
def test_chosen_slots_that_stayed_have_their_biases(fit: Any, tiny_export: Path, tmp_path: Path):
    """Fitted to what was evicted: with as many slots as there are a step is that of attention to all that stayed."""
    decoder, steps, options = tiny_export / "decoder.onnx", [], {"blocks": "delimiters", "fit": fit}
    build: dict[str, Any] = {"budgets": [0.25], "weights": "fp32"}
    for attend in (512, None):
        method = DynSplit(attend=attend, **options)
        built = build_bundle(decoder, tmp_path / str(attend), method=method, native="on", **build)
        session = open_session(built, budget=0.25)
        session.prefill(text(1, 230))
        steps.append(np.stack([session.step([token + 20]).copy() for token in range(20)]))
        assert np.abs(session.engine.read("slot_bias", 0)).max() > 0.1
    np.testing.assert_allclose(*steps, atol=1e-3)
    assert validate(tmp_path / "512", tokens=250).passed
    with pytest.raises(SemkvError, match=r"--native off: .*no biases without native operators.*fit=none"):
        build_bundle(decoder, tmp_path / "b", method=DynSplit(attend=512, **options), native="off", **build)


def test_in_place_and_copying_give_the_same(bundles: dict[str, Path]):
    first, second = (conversation(opened(bundles["few"], batch=2, in_place=each)) for each in (True, False))
    np.testing.assert_array_equal(first, second)


def test_a_saved_session_goes_on(bundles: dict[str, Path], tmp_path: Path):
    session = opened(bundles["few"], batch=2)
    conversation(session)
    session.save(tmp_path / "s")
    other = opened(bundles["few"], batch=2, state=tmp_path / "s")
    for token in range(20):
        np.testing.assert_array_equal(session.step([token + 9, 13]), other.step([token + 9, 13]))


def test_what_cannot_be_built_is_said(tiny_export: Path, tmp_path: Path):
    decoder, out = tiny_export / "decoder.onnx", tmp_path / "b"
    build: dict[str, Any] = {"budgets": [1.0], "weights": "fp32", "method": DynSplitSelect()}
    with pytest.raises(SemkvError, match=r"no operators for such caches.*expected float32, got float16"):
        build_bundle(decoder, out, native="on", cache_dtype="float16", **build)
    options = TensorRTOptions(engines=False, layout="dual")
    with pytest.raises(SemkvError, match=r"--layout dual: .*takes an engine for each.*Add --layout split"):
        build_bundle(decoder, out, target="tensorrt-rtx", tensorrt=options, **build)
    with pytest.raises(SemkvError, match=r"--cache-groups.*groups of one capacity"):
        build_bundle(decoder, out, groups=by_layer([1.0, 2.0], 2), **{**build, "budgets": [0.5]})
    assert not out.exists()


@pytest.mark.parametrize("name", ["few", "mean"])
def test_a_host_of_the_contract_alone_does_the_same(bundles: dict[str, Path], name: str, native_library: Path):
    """Logits and representatives, bit for bit; new buffers hold numbers that mean nothing."""
    session = opened(bundles[name], batch=2)
    host = Host(bundles[name], "onnxruntime-cpu", batch=2, library=native_library)
    for turn in range(3):
        prompts = [text(turn, 90), text(9 - turn, 41)]
        expected = session.prefill(prompts)
        np.testing.assert_array_equal(np.stack([host.prompt(row, ids) for row, ids in enumerate(prompts)]), expected)
        for token in range(20):
            tokens = np.array([token + 20, 13])
            wanted = [True, token % 3 > 0]
            ours, theirs = session.step(tokens, np.array(wanted)), host.step(tokens, wanted)
            np.testing.assert_array_equal(theirs[wanted], ours[wanted])
    for row in range(2):
        for group in range(2):
            ours = session.engine.read("representatives", group)[row, :, : host.closed[row]]
            np.testing.assert_array_equal(host.buffers["representatives"][group][row, :, : host.closed[row]], ours)


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("reduce_max", [0, 1])
def test_the_native_operator_is_the_reference(vectors: int, reduce_max: int, native_library: Path):
    """Rows with other counts, empty blocks, pinned ones, a width that cuts; the same slots."""
    import onnxruntime as ort
    import torch

    random = np.random.default_rng(vectors)
    batch, heads, kv_heads, blocks, longest, size, width = 3, 6, 2, 40, 7, 24, 61
    lengths = random.integers(0, longest + 1, (batch, blocks))
    starts = np.cumsum(lengths, 1) - lengths
    step = np.arange(longest)
    slots = np.where(step < lengths[..., None], starts[..., None] + step, -1)
    table = np.sort(random.standard_normal((batch, kv_heads, blocks, vectors, size)), 3).astype(np.float32)
    feeds = {
        "query": random.standard_normal((batch, heads, 2, size)).astype(np.float32),
        "representatives": table,
        "block_slots": slots,
        "block_count": np.array([blocks, 17, 0]),
        "pinned": (random.random((batch, blocks)) < 0.1).astype(np.int64),
    }
    node = onnx.helper.make_node(
        "SemanticBlockSelect", list(feeds), ["index"], domain="semkv", width=width, reduce_max=reduce_max
    )
    kinds = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int64): onnx.TensorProto.INT64}
    inputs = [onnx.helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in feeds.items()]
    output = onnx.helper.make_tensor_value_info("index", onnx.TensorProto.INT64, None)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 21), ("semkv", 1))]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, [output]), opset_imports=opsets)
    model.ir_version = 10
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(native_library))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    (expected,) = semantic_block_select.reference(*(torch.from_numpy(a) for a in feeds.values()), width, reduce_max)
    np.testing.assert_array_equal(found, expected.numpy())
    with pytest.raises(Exception, match="block_count of batch row 1"):
        session.run(None, {**feeds, "block_count": np.array([1, 41, 0])})

"""The contract is enough: a host written from it alone does what a session does; and what its rules say is so."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle, TensorRTRecord
from semkv_deploy.bundle.contract import NO_MERGE, StaticBudgetContract
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import Full, SemantiCache, StreamingLLM
from semkv_deploy.runtime.session import NEVER, Session
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from semkv_deploy.validate.checks import Graphs, open_session

from . import contract_host
from .contract_host import Host


@pytest.fixture(scope="module")
def windowed_export(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Qwen2 of two layers, the second with a sliding window of 40 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from semkv_deploy.export import export_model

    folder = tmp_path_factory.mktemp("windowed")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=0,
        use_sliding_window=True,
        sliding_window=40,
        max_window_layers=1,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder / "checkpoint")
    export_model(str(folder / "checkpoint"), folder / "export", SemantiCache())
    return folder / "export"


def built(export: Path, out: Path, method: Any, layout: Any = "dual", batch: int = 1, budget: float = 0.25) -> Bundle:
    return build_bundle(
        str(export / "decoder.onnx"),
        out,
        budgets=[budget],
        method=method,
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(engines=False, dtype="float32", layout=layout, batch=batch),
    )


def session_of(bundle: Bundle, batch: int) -> Session:
    """The runtime's own session on the same graphs."""
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    paths = {engine.phase: bundle.root / engine.onnx for engine in record.budgets[0].engines}
    graphs = Graphs(paths["decoder"], paths.get("compressor"), in_place=True)
    return open_session(bundle, bundle.manifest.profiles[0], graphs, batch=batch)


def words(seed: int, count: int) -> list[int]:
    """Ids in which words repeat, delimiters among them."""
    random = np.random.default_rng(seed)
    pieces = [[*random.integers(2, 512, 4).tolist(), 15 if i % 2 else 13] for i in range(6)]
    return [token for i in random.integers(0, 6, count) for token in pieces[i]][:count]


METHODS = {
    "semanticache": (SemantiCache(), 1),
    "rows": (SemantiCache(), 3),
    "by head, at turns": (SemantiCache(cluster_by="head", compress_at="turn", recent=0.3, sinks=2), 2),
    "streaming-llm": (StreamingLLM(), 2),
    "streaming-llm, at turns": (StreamingLLM(compress_at="turn", sinks=6), 1),
}


@pytest.mark.parametrize("layout", ["dual", "split"])
@pytest.mark.parametrize("name", [*METHODS, "windows"])
def test_a_host_of_the_contract_alone_is_a_session(
    name: str, layout: str, tiny_export: Path, windowed_export: Path, tmp_path: Path
):
    """Three turns, a compression in each but the first, then a new conversation in the same buffers."""
    method, batch = METHODS.get(name, (SemantiCache(), 2))
    export = windowed_export if name == "windows" else tiny_export
    bundle = built(export, tmp_path / "dual", method, batch=batch)
    session = session_of(bundle, batch)
    # Split engines for prefill and decode are compared with one for both, whose sums may run in another order.
    root = bundle.root if layout == "dual" else built(export, tmp_path / "split", method, layout, batch).root
    atol = 0 if layout == "dual" else 2e-4
    host = Host(root, "tensorrt-rtx")
    for conversation in range(2):
        for turn in range(3):
            prompts = [words(10 * turn + row + conversation, 60 + 7 * row) for row in range(batch)]
            expected = session.prefill(prompts)
            logits = np.stack([host.prompt(row, ids) for row, ids in enumerate(prompts)])
            for step in range(12):
                np.testing.assert_allclose(logits, expected, atol=atol * 100, rtol=0)
                tokens = expected.argmax(-1)
                assert tokens.tolist() == logits.argmax(-1).tolist()
                # The last row stops first, as one that said its stop token.
                wanted = [row < batch - 1 or batch == 1 or step < 5 for row in range(batch)]
                expected, logits = session.step(tokens, np.array(wanted)).copy(), host.step(tokens, wanted)
            session.end_turn()
            host.end_turn()
            same(host, session, atol)
        assert host.compressions > 1 and session.stats.runs == host.compressions
        session.reset()
        host.new_conversation()
        host.compressions = 0


def same(host: Host, session: Session, atol: float) -> None:
    np.testing.assert_array_equal(host.position, session.position)
    np.testing.assert_array_equal(host.length, session.length)
    for number, (ours, theirs) in enumerate(zip(host.layers, session.engine.layers, strict=True)):
        for row, live in enumerate(host.length[number]):
            for mine, other in (
                (host.slot_position, session.slot_position),
                (host.slot_chunk, session.slot_chunk),
            ):
                np.testing.assert_array_equal(mine[number, row, :, :live], other[number, row, :, :live])
            for kind in ("key", "value", "bias"):
                mine, other = ours[kind][row, :, :live], getattr(theirs, kind)[row, :, :live]
                np.testing.assert_allclose(mine, other, atol=atol, rtol=0)
            # The dead slot rule.
            assert not ours["bias"][row, :, live:].any()


def test_a_bias_in_a_dead_slot_stays_with_what_is_appended_there(tiny_export: Path, tmp_path: Path):
    """Why slot_bias must be 0 there, where keys and values may be anything: `Host` fills those with 7."""
    bundle = built(tiny_export, tmp_path / "b", SemantiCache())
    clean, biased, dirty = (Host(bundle.root, "tensorrt-rtx") for _ in range(3))
    for host in (biased, dirty):
        host.layers[0]["bias"][:, :, 40:] = 1.5 if host is biased else 0
        host.layers[0]["key"][:, :, 40:] = -9
    logits = [host.prompt(0, words(1, 60)) for host in (clean, biased, dirty)]
    np.testing.assert_array_equal(logits[0], logits[1])
    logits = [host.prompt(0, words(2, 20)) for host in (clean, biased, dirty)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    np.testing.assert_array_equal(logits[0], logits[2])


def test_contract_has_what_the_session_gives(windowed_export: Path, tmp_path: Path):
    bundle = built(windowed_export, tmp_path / "b", SemantiCache(sinks=3, recent=0.4))
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    contract, profile = record.budgets[0].contract, bundle.manifest.profiles[0]
    compressor = contract.compressor
    assert compressor is not None and contract.windows == (0, 40)
    assert compressor.thresholds == (tuple(profile.thresholds[0]), (NO_MERGE,) * 24) and NO_MERGE == NEVER
    assert compressor.sinks == (3, 0) and compressor.minimum_target == 4
    method = bundle.manifest.method
    for target in range(1, profile.capacity + 1):
        assert int(np.floor(compressor.recent_share * target)) == method.recent_slots(target)
    assert (bundle.root / contract.delimiters).is_file()
    assert StaticBudgetContract.model_validate_json(contract.model_dump_json()) == contract


def test_full_cache_has_no_compressor(tiny_export: Path, tmp_path: Path):
    record = built(tiny_export, tmp_path / "b", Full()).target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord) and record.budgets[0].contract.compressor is None


def test_the_host_knows_nothing_of_the_package():
    tree = ast.parse(Path(contract_host.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "json", "pathlib", "typing", "numpy", "numpy.typing", "onnxruntime"}

"""The contract is enough: a host written from it alone does what a session does; and what its rules say is so."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import contract_host
import numpy as np
import pytest
from contract_host import Host

from semkv_deploy.bundle import Bundle
from semkv_deploy.bundle.contract import Contract
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import Full, Method, SemantiCache, Sonic, StreamingLLM
from semkv_deploy.methods.behaviours import NO_MERGE
from semkv_deploy.model.cache_groups import GroupShare, by_layer, one_a_head
from semkv_deploy.runtime.behaviours.slot_tables import SlotTabulator
from semkv_deploy.runtime.session import Session
from semkv_deploy.targets.onnxruntime import native
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from tests.tiny import with_adapter

from ..methods.matrix import FORMS


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


GROUPS: dict[str, Any] = {
    "uniform": None,
    "by layer": by_layer([1.0, 2.0], 2),
    "by head": one_a_head(2, 2),
    "mixed": (
        GroupShare(layer=0, heads=(0, 1)),
        GroupShare(layer=1, heads=(0,), share=1.5),
        GroupShare(layer=1, heads=(1,), share=0.6),
    ),
}
"""Cache groups of a model of two layers with two KV heads."""


def built(
    export: Path,
    out: Path,
    method: Method,
    layout: Any = "dual",
    batch: int = 1,
    budget: float = 0.25,
    groups: Any = None,
) -> Bundle:
    """A bundle for ONNX Runtime and TensorRT, everything in float32, built and opened."""
    layout = "split" if method.selects else layout
    build_bundle(
        str(export / "decoder.onnx"),
        out,
        budgets=[budget],
        method=with_adapter(method, export),
        groups=groups,
        target=["onnxruntime-cpu", *([] if method.reads_again else ["tensorrt-rtx"])],
        weights="fp32",
        native="off",
        tensorrt=TensorRTOptions(engines=False, dtype="float32", layout=layout, batch=batch),
    )
    return Bundle.open(out)


def session_of(bundle: Bundle, target: str, batch: int) -> Session:
    """The runtime's own session on the same graphs; TensorRT's are run by ONNX Runtime."""
    return Session(OnnxRuntimeEngine(bundle.built(target), batch=batch))


def words(seed: int, count: int) -> list[int]:
    """Ids in which words repeat, delimiters among them."""
    random = np.random.default_rng(seed)
    pieces = [[*random.integers(2, 512, 4).tolist(), 15 if i % 2 else 13] for i in range(6)]
    return [token for i in random.integers(0, 6, count) for token in pieces[i]][:count]


CASES = [
    *((name, "uniform", 2) for name in FORMS),
    *((name, groups, 2) for name in ("semanticache, by head, at turns", "streaming-llm", "full") for groups in GROUPS),
    ("semanticache", "by head", 3),
    ("semanticache", "mixed", 1),
    ("semanticache", "windows", 2),
    ("streaming-llm, at turns", "windows", 1),
    ("sonic", "mixed", 1),
    ("sonic, at turns, with a window", "by head", 3),
    ("importance", "by head", 3),
    ("importance", "mixed", 1),
    ("importance", "windows", 2),
    ("dynsplit", "mixed", 1),
    ("dynsplit, predicted, at turns", "by head", 3),
    ("dynsplit", "windows", 2),
    ("dynsplit-select", "windows", 1),
]
"""Method, cache groups (or a model with a window), rows."""

SPLIT = [("semanticache", "uniform"), ("semanticache", "windows"), ("streaming-llm", "mixed"), ("full", "by layer")]
"""Those that are also built with an engine for prompts and one for steps."""


@pytest.mark.parametrize("name, groups, batch", sorted(set(CASES)), ids=lambda value: str(value))
def test_a_host_of_the_contract_alone_is_a_session(
    name: str, groups: str, batch: int, tiny_export: Path, windowed_export: Path, tmp_path: Path
):
    """Three conversations of three turns, in the same buffers, on every target and layout."""
    method, windows = FORMS[name], groups == "windows"
    export = windowed_export if windows else tiny_export
    budget = 0.5 if method.compresses else 1.0
    shares = None if windows else GROUPS[groups]
    dual = built(export, tmp_path / "dual", method, batch=batch, budget=budget, groups=shares)
    for target in dual.manifest.targets:
        converse(dual, dual.root, target, batch, atol=0)
    if (name, groups) not in SPLIT:
        return
    # Split engines for prefill and decode are compared with one for both, whose sums may run in another order.
    split = built(export, tmp_path / "split", method, "split", batch, budget, shares)
    converse(dual, split.root, "tensorrt-rtx", batch, atol=2e-4)


def converse(bundle: Bundle, root: Path, target: str, batch: int, atol: float) -> None:
    """Compares a session of `bundle` with a host of the bundle at `root`."""
    session = session_of(bundle, target, batch)
    library = None if session.contract.native is None else native.LIBRARY
    host = Host(root, target, batch=batch, library=library)
    for conversation in range(3):
        for turn in range(3):
            prompts = [words(10 * turn + row + conversation, 90 + 17 * row) for row in range(batch)]
            expected = session.prefill(prompts)
            logits = np.stack([host.prompt(row, ids) for row, ids in enumerate(prompts)])
            for step in range(8):
                np.testing.assert_allclose(logits, expected, atol=atol * 100, rtol=0)
                tokens = expected.argmax(-1)
                assert tokens.tolist() == logits.argmax(-1).tolist()
                # The last row stops first, as one that said its stop token.
                wanted = [row < batch - 1 or batch == 1 or step < 5 for row in range(batch)]
                ours, theirs = session.step(tokens, np.array(wanted)).copy(), host.step(tokens, wanted)
                expected, logits = (np.where(np.array(wanted)[:, None], each, 0) for each in (ours, theirs))
            session.end_turn()
            host.end_turn()
            same(host, session, atol)
        # A session drops the turns of all rows at once where several go on in one call.
        turns = isinstance(bundle.manifest.method, Sonic) or getattr(bundle.manifest.method, "isolates", False)
        at_once = turns and batch > 1
        assert session.stats.runs == host.compressions or (at_once and session.stats.runs < host.compressions)
        assert host.compressions > 1 or not bundle.manifest.method.compresses
        session.reset()
        host.new_conversation()
        host.compressions = 0


def same(host: Host, session: Session, atol: float) -> None:
    np.testing.assert_array_equal(host.position, session.position)
    np.testing.assert_array_equal(host.length, session.length)
    for group, lengths in enumerate(host.length):
        for row, live in enumerate(lengths):
            for name, theirs in session.slots.columns.items():
                mine, other = (each[group][row, :, :live] for each in (host.columns[name], theirs))
                np.testing.assert_array_equal(mine, other)
            for name in host.buffers:
                if name == "representatives" and isinstance(session.behaviours[-1], SlotTabulator):
                    continue
                # Of blocks that are closed; what others have was written by none.
                last = host.closed[row] if name == "representatives" else live
                mine, other = host.buffers[name][group][row, :, :last], session.engine.read(name, group)[row, :, :last]
                np.testing.assert_allclose(mine, other, atol=atol, rtol=0)
            # The dead slot rule.
            for name in {"slot_bias", "slot_attention"} & set(host.buffers):
                assert not host.buffers[name][group][row, :, live:].any()
    for behaviour in host.contract["behaviours"]:
        if behaviour["kind"] == "slot_tables":
            same_tables(host, session, behaviour, atol)


def same_tables(host: Host, session: Session, behaviour: dict[str, Any], atol: float) -> None:
    """Ends of each head's blocks, and representatives of all but its last."""
    tabulator = session.behaviours[-1]
    assert isinstance(tabulator, SlotTabulator)
    ends = host.slot_tables(behaviour)
    np.testing.assert_array_equal(ends, tabulator.ends)
    first = 0
    for group, mine in enumerate(host.buffers["representatives"]):
        theirs = session.engine.read("representatives", group)
        for row, head in np.ndindex(mine.shape[:2]):
            closed = max(int((ends[row, first + head] > 0).sum()) - 1, 0)
            np.testing.assert_allclose(mine[row, head, :closed], theirs[row, head, :closed], atol=atol, rtol=0)
        first += mine.shape[1]


def test_a_bias_in_a_dead_slot_stays_with_what_is_appended_there(tiny_export: Path, tmp_path: Path):
    """Why slot_bias must be 0 there, where keys and values may be anything: `Host` fills those with 7."""
    bundle = built(tiny_export, tmp_path / "b", SemantiCache())
    clean, biased, dirty = (Host(bundle.root, "tensorrt-rtx") for _ in range(3))
    for host in (biased, dirty):
        host.buffers["slot_bias"][0][:, :, 40:] = 1.5 if host is biased else 0
        host.buffers["key"][0][:, :, 40:] = -9
    logits = [host.prompt(0, words(1, 60)) for host in (clean, biased, dirty)]
    np.testing.assert_array_equal(logits[0], logits[1])
    logits = [host.prompt(0, words(2, 20)) for host in (clean, biased, dirty)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    np.testing.assert_array_equal(logits[0], logits[2])


def test_contract_says_what_a_window_allows(windowed_export: Path, tmp_path: Path):
    bundle = built(windowed_export, tmp_path / "b", SemantiCache(sinks=3, recent=0.4), budget=0.5)
    for target in bundle.manifest.targets:
        contract = bundle.built(target).contract
        room = contract.make_room
        assert room is not None and contract.windows == (0, 40)
        ladder = room.by_group["thresholds"]
        assert ladder[1] == (NO_MERGE,) * 24 and isinstance(ladder[0], tuple) and max(ladder[0]) < 1
        assert room.by_group["sinks"] == (3, 0) and room.least == 4
        for target_slots in range(1, contract.capacity + 1):
            recent = max(int(np.floor(room.recent_share * target_slots)), room.recent_least)
            assert recent == bundle.manifest.method.recent_slots(target_slots)
        assert (bundle.root / contract.delimiters).is_file()
        assert Contract.model_validate_json(contract.model_dump_json()) == contract


def test_capacities_differ_and_the_budget_is_their_total(tiny_export: Path, tmp_path: Path):
    """Named apart in the portable shapes, static in TensorRT's graphs, and one compressor for each shape of group."""
    even = built(tiny_export, tmp_path / "even", StreamingLLM(), budget=0.75)
    bundle = built(tiny_export, tmp_path / "b", StreamingLLM(), budget=0.75, groups=GROUPS["mixed"])
    contract = bundle.built("tensorrt-rtx").contract
    capacities = [group.capacity for group in contract.cache.groups]
    assert len(set(capacities)) == 3 and contract.cache_bytes() <= even.built("tensorrt-rtx").contract.cache_bytes()
    shapes = {tensor.name: tensor.shape for tensor in contract.decoders[0].inputs}
    assert [shapes[f"past_key_values.{group:02d}.key"][2] for group in range(3)] == capacities
    assert sorted(graph.groups for graph in contract.compressors) == [(0,), (1,), (2,)]
    portable = {tensor.name: tensor.shape for tensor in bundle.portable().contract.decoders[0].inputs}
    assert [portable[f"past_key_values.{group:02d}.value"][1:3] for group in range(3)] == [
        (2, "capacity_0"),
        (1, "capacity_1"),
        (1, "capacity_2"),
    ]


def test_full_cache_has_no_compressor(tiny_export: Path, tmp_path: Path):
    bundle = built(tiny_export, tmp_path / "b", Full())
    for target in bundle.manifest.targets:
        contract = bundle.built(target).contract
        assert contract.make_room is None and list(contract.programs) == ["decode"]


def test_the_host_knows_nothing_of_the_package():
    tree = ast.parse(Path(contract_host.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "json", "math", "pathlib", "typing", "numpy", "numpy.typing", "onnxruntime"}

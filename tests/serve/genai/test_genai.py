"""onnxruntime-genai runs a bundle's decoder: the tokens of a session of ours, or one sentence that says why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from semkv_deploy import open_session
from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import METHODS
from semkv_deploy.serve.genai.directory import foreign, write_genai
from semkv_deploy.targets.tensorrt.build import TensorRTOptions

from ...cli.commands import cli, nothing_left, refused
from ...docs.blocks import blocks

genai = pytest.importorskip("onnxruntime_genai")

GRAPHS_ONLY = TensorRTOptions(engines=False)
TURNS = ("The weather is fine today, and so is the harbour.", "And then? Why?", "Tell me once more of the lighthouse.")
REPLY = 24


@pytest.fixture(scope="module")
def written(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full cache of a bundle that compresses at its other budgets."""
    out = tmp_path_factory.mktemp("genai") / "model"
    write_genai(tiny_bundle, out)
    return out


def generator(folder: Path, **options: Any) -> tuple[Any, Any]:
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(**options)
    return genai.Generator(model, settings), genai.Tokenizer(model)


def of_genai(folder: Path, turns: Sequence[str]) -> list[list[int]]:
    """Greedy replies of one conversation; ends of a reply are tokens like others."""
    host, tokenizer = generator(folder, max_length=512, min_length=512)
    replies: list[list[int]] = []
    for turn in turns:
        tokens = [int(token) for token in tokenizer.encode(turn)]
        if replies:
            # genai 0.18 counts a reply's last token and never runs it where more is appended: a hole in its cache.
            host.rewind_to(len(host.get_sequence(0)) - 1)
            tokens = [replies[-1][-1], *tokens]
        host.append_tokens(np.array(tokens, np.int32))
        before = len(host.get_sequence(0))
        for _ in range(REPLY):
            host.generate_next_token()
        replies.append([int(token) for token in host.get_sequence(0)[before:]])
    return replies


def of_session(bundle: Path, folder: Path, turns: Sequence[str]) -> list[list[int]]:
    """The same of a session: what cannot be chosen below genai's least length is not chosen here either."""
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    session = open_session(Bundle.open(bundle), budget=1.0)
    stops = list(session.contract.stop_ids)
    replies = []
    for turn in turns:
        logits = session.prefill([int(token) for token in tokenizer.encode(turn)])
        reply: list[int] = []
        while len(reply) < REPLY:
            allowed = logits[0].copy()
            allowed[stops] = -np.inf
            reply.append(int(allowed.argmax()))
            logits = session.step([reply[-1]])
        replies.append(reply)
    return replies


def test_three_turns_are_a_sessions(tiny_bundle: Path, written: Path):
    expected = of_session(tiny_bundle, written, TURNS)
    assert of_genai(written, TURNS) == expected
    assert len({tuple(reply) for reply in expected}) == len(TURNS)
    assert expected[1] != of_session(tiny_bundle, written, TURNS[1:])[0], "replies depend on what went before"


def test_rows_of_unequal_length_are_what_each_is_alone(written: Path):
    texts = [TURNS[2], "Why?"]

    def replies(texts: list[str]) -> list[list[int]]:
        host, tokenizer = generator(written, max_length=512, min_length=512, batch_size=len(texts))
        host.append_tokens(tokenizer.encode_batch(texts))
        for _ in range(REPLY):
            host.generate_next_token()
        return [[int(token) for token in host.get_sequence(row)[-REPLY:]] for row in range(len(texts))]

    assert replies(texts) == [replies([text])[0] for text in texts]


def test_beams_have_caches_that_grow(tiny_bundle: Path, written: Path):
    """There genai shares no buffer: past and present are two. What three beams find is likelier than a greedy reply."""

    def text(beams: int) -> list[int]:
        host, tokenizer = generator(written, max_length=64, num_beams=beams)
        host.append_tokens(tokenizer.encode(TURNS[0]))
        for _ in range(8):
            host.generate_next_token()
        return [int(token) for token in host.get_sequence(0)]

    def likelihood(tokens: list[int]) -> float:
        session = open_session(Bundle.open(tiny_bundle), budget=1.0)
        logits = session.prefill(tokens, all_logits=True).reshape(len(tokens), -1).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(sum(logits[place - 1, tokens[place]] for place in range(len(tokens) - 8, len(tokens))))

    beams, greedy = text(3), text(1)
    assert beams != greedy
    assert likelihood(beams) > likelihood(greedy)


@pytest.mark.parametrize("kind", ["importance", "dynsplit"])
def test_what_a_method_records_is_left_out(kind: str, tiny_export: Path, tiny_bundle: Path, tmp_path: Path):
    """Their decoders take buffers in which they note what is looked at: for compressing, which nothing here does."""
    options: Any = {"budgets": [1.0], "weights": "fp32", "native": "off"}
    build_bundle(str(tiny_export / "decoder.onnx"), tmp_path / "b", method=METHODS[kind](), **options)
    write_genai(tmp_path / "b", tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    caches = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert {each.name for each in graph.input} == {"input_ids", "attention_mask", "position_ids", *caches}
    assert of_genai(tmp_path / "out", TURNS[:1]) == of_session(tiny_bundle, tmp_path / "out", TURNS[:1])


def test_weights_are_the_bundles(tiny_bundle: Path, written: Path):
    weights = "decoder.onnx.data"
    assert (written / weights).read_bytes() == (tiny_bundle / "targets" / "onnxruntime-cpu" / weights).read_bytes()


def rebuilt(tiny_export: Path, out: Path, kind: str, **options: Any) -> Path:
    options = {"budgets": [1.0], "weights": "fp32", "native": "off", **options}
    build_bundle(str(tiny_export / "decoder.onnx"), out, method=METHODS[kind](), **options)
    return out


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "full",
            {"target": "tensorrt-rtx", "tensorrt": GRAPHS_ONLY},
            "runs graphs of ONNX Runtime .*one for tensorrt-rtx",
        ),
        ("semanticache", {"budgets": [0.25, 0.5]}, "compresses no cache .*expected budget 1 .*got 0.25, 0.5"),
        ("dynsplit-select", {}, "does not do what dynsplit-select asks of a host .*block_tables"),
        ("full", {"groups": "head"}, "one cache for each layer .*4 groups in 2 layers"),
    ],
)
def test_what_it_cannot_keep_is_refused(
    kind: str, options: dict[str, Any], said: str, tiny_export: Path, tmp_path: Path
):
    bundle = rebuilt(tiny_export, tmp_path / "b", kind, **options)
    with pytest.raises(SemkvError, match=said):
        write_genai(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_native_operators_are_refused(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Bundle.open(tiny_bundle)
    record = opened.manifest.targets["onnxruntime-cpu"]
    budgets = [
        each.model_copy(update={"contract": each.contract.model_copy(update={"native": 3})}) for each in record.budgets
    ]
    targets = {"onnxruntime-cpu": record.model_copy(update={"budgets": budgets})}
    changed = Bundle(tiny_bundle, opened.manifest.model_copy(update={"targets": targets}))
    monkeypatch.setattr(Bundle, "open", lambda root: changed)
    with pytest.raises(SemkvError, match=r"native operators .*--native off"):
        write_genai(tiny_bundle, tmp_path / "out")


def test_the_command_writes_it_and_replaces_only_its_own(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path):
    out = tmp_path / "genai"
    done = cli("export", tiny_bundle, "--for", "onnxruntime-genai", "-o", out)
    assert done.returncode == 0 and "open it with onnxruntime_genai.Model" in done.stdout, done.stderr
    assert json.loads((out / "genai_config.json").read_text())["model"]["context_length"] == 512
    assert foreign(out) is None
    again = ("export", tiny_bundle, "--for", "onnxruntime-genai", "-o", out, "--force")
    assert cli(*again).returncode == 0
    (out / "thesis.txt").write_text("mine")
    refused(cli(*again), "holds more than this tool wrote", "thesis.txt")
    assert foreign(tiny_checkpoint) == "genai_config.json"


def test_what_is_no_bundle_or_no_checkpoint_is_said(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    refused(cli("export", tiny_bundle, "-o", out), "a bundle is no checkpoint", "--for onnxruntime-genai")
    refused(cli("export", tiny_checkpoint, "--for", "onnxruntime-genai", "-o", out), "not a bundle")
    words = ("export", tiny_bundle, "--for", "onnxruntime-genai", "-o", out, "--method", "full")
    refused(cli(*words), "a bundle has its method already", "Leave out --method")
    nothing_left(tmp_path)


def test_the_page_runs(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (command,) = [block for block in blocks("foreign.md", "sh") if "--for onnxruntime-genai" in block]
    (code,) = blocks("foreign.md")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    done = cli(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    variables: dict[str, Any] = {}
    exec(code, variables)
    assert variables["reply"].startswith("The weather is") and len(variables["reply"]) > len("The weather is")

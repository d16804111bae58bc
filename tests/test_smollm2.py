"""SmolLM2-135M-Instruct, the whole way: GGUF to bundle to conversation, against transformers on the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.calibrate import calibration_text, mean_kl
from semkv_deploy.runtime.chat import Chat
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.targets.onnxruntime.native import LIBRARY

from .runtime_cpp.conftest import driver  # noqa: F401
from .runtime_cpp.driver import Driver

ROOT = Path(__file__).parent.parent
QUESTIONS = [
    "Describe a harbour town in the morning.",
    "What might a visitor eat there?",
    "Write a short poem about the sea.",
]


@pytest.fixture(scope="module")
def bundle(smollm2_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Budgets 0.2 and 1 of 2,048 tokens, float32 weights."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import SemantiCache

    out = tmp_path_factory.mktemp("smollm2") / "bundle"
    return build_bundle(
        str(smollm2_export / "decoder.onnx"),
        out,
        budgets=[0.2, 1.0],
        method=SemantiCache(),
        max_context=2048,
        weights="fp32",
    )


def transformers_replies(
    model: Any, prompts: list[list[int]], lengths: list[int]
) -> tuple[list[list[int]], np.ndarray]:
    """Greedy replies over turns with transformers' own cache, and the logits of every reply token `[n,V]`."""
    import torch
    from transformers import DynamicCache

    cache, replies, logits = DynamicCache(), [], []
    with torch.no_grad():
        for prompt, length in zip(prompts, lengths, strict=True):
            ids, reply = torch.tensor([prompt]), []
            for _ in range(length):
                last = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
                logits.append(last.numpy())
                reply.append(int(last.argmax()))
                ids = torch.tensor([[reply[-1]]])
            # The last token of a reply is fed too, as our session does.
            model(ids, past_key_values=cache, logits_to_keep=1)
            replies.append(reply)
    return replies, np.stack(logits)


def test_budget_one_equals_transformers_over_three_turns(bundle: Bundle, smollm2_model: Any):
    session = open_session(bundle, budget=1.0)
    tokenizer = load_tokenizer(bundle.root)
    chat = Chat(session, tokenizer, bundle.manifest.model.eos_token_ids)
    prompts, replies, logits = [], [], []
    lengths = [70, 70, 60]
    for question, length in zip(QUESTIONS, lengths, strict=True):
        prompts.append(chat.user_tokens(question))
        row = session.prefill(prompts[-1])
        reply: list[int] = []
        for _ in range(length):
            logits.append(row[0].copy())
            reply.append(int(row[0].argmax()))
            row = session.step([reply[-1]])
        chat.add_reply(reply)
        replies.append(reply)
    expected, expected_logits = transformers_replies(smollm2_model, prompts, lengths)
    assert replies == expected and sum(map(len, replies)) == 200
    assert np.abs(np.stack(logits) - expected_logits).max() <= 1e-3


def test_a_fifth_of_the_cache_stays_close_to_all_of_it(bundle: Bundle):
    """1,100 tokens of prose, dialogue and code through 448 slots: KL is 0.03 past the capacity, nothing is evicted."""
    tokens = load_tokenizer(bundle.root).encode(calibration_text())[:1100]
    full = open_session(bundle, budget=1.0).prefill(tokens, all_logits=True)
    session = open_session(bundle, budget=0.2)
    fifth = session.prefill(tokens, all_logits=True)
    first = session.contract.cache.groups[0].capacity
    assert first == 448 and session.kept_slots[0] <= 448
    assert session.stats.runs > 3 and session.stats.evicted == 0
    assert 0 < mean_kl(full[first::3], fifth[first::3]) < 0.05


def test_delimiters_of_the_real_vocabulary(bundle: Bundle):
    import json

    ids = json.loads((bundle.root / "delimiters.json").read_text(encoding="utf-8"))["token_ids"]
    tokenizer = load_tokenizer(bundle.root)
    texts = {tokenizer.decode([token]) for token in ids}
    assert {".", ",", "?", "!", ";", ":", " ", "\n", "\t", "<|im_end|>"} <= texts
    assert not {" the", "the", "a", "1"} & texts


def test_demo(tmp_path: Path):
    """The demo's own path, on a short conversation."""
    import json

    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--output", str(tmp_path / "demo")]
    sizes = ["--tokens", "400", "--max-context", "640", "--reply-tokens", "32", "--json", str(tmp_path / "table.json")]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    full, half, fifth = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert full["kept"] == full["tokens"] == fifth["tokens"] > 400
    assert fifth["kept"] <= 128 and half["kept"] <= 320
    assert fifth["cache_mib"] < half["cache_mib"] < full["cache_mib"]
    assert fifth["kl"] > half["kl"] >= 0
    assert "tokens of conversation" in done.stdout


def test_cpp_says_what_python_says(bundle: Bundle, driver: Path):  # noqa: F811
    """The same tokens and slots on the same bundle; it is compressed within the prompt, and after each turn."""
    tokenizer = load_tokenizer(bundle.root)
    prompt = tokenizer.encode(calibration_text())[:470]
    session = open_session(bundle, budget=0.2, threads=1)
    with Driver(driver) as cpp:
        cpp.open(bundle.root, budget=0.2, **({"native_library": str(LIBRARY)} if session.contract.native else {}))
        for ids in (prompt, tokenizer.encode(QUESTIONS[0])):
            expected = session.generate(ids, max_new_tokens=12)
            assert cpp("generate", rows=[ids], most=12, stops=[])["replies"] == expected
            session.compress()
            cpp("compress")
        stats = cpp("stats", row=0)
    assert stats["compressions"] == session.stats.runs == 3
    assert stats["kept_slots"] == session.kept_slots[0] < stats["position"] == session.position[0]

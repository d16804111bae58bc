"""Sessions of every kind of method share rows: what each behaviour keeps of a row is that row's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.chat import Chat
from semkv_deploy.runtime.open import open_session
from semkv_deploy.serve.turn import Request
from tests.tiny import with_adapter

from ..methods.matrix import FORMS
from .schedulers import Heard, Parts, alone, prompt, run, scheduler


def built(name: str, export: Path, out: Path) -> Parts:
    method = with_adapter(FORMS[name], export)
    build_bundle(export / "decoder.onnx", out, budgets=[0.25], method=method, weights="fp32", max_context=512)
    return Parts.of(out)


@pytest.mark.parametrize("name", ["streaming-llm, at turns", "importance", "dynsplit"])
def test_interleaved_conversations_are_what_they_are_alone(name: str, tiny_export: Path, tmp_path: Path):
    """Twelve turns on four rows, past the capacity of 128 slots; turns of one session between those of others."""
    parts = built(name, tiny_export, tmp_path / "b")
    server = scheduler(parts)
    turns = {f"s{s}": [prompt(10 * s + t, 45 + 9 * s) for t in range(3)] for s in range(4)}
    heard: dict[str, list[Heard]] = {session: [] for session in turns}
    for turn in range(3):
        for session in turns:
            heard[session].append(Heard())
            server.submit(session, Request(ids=turns[session][turn], max_new_tokens=12), heard[session][-1])
    run(server)
    for session, prompts in turns.items():
        assert [each.ids for each in heard[session]] == alone(parts, prompts, 12)
    assert server.statistics.compressions > 0


def test_a_system_message_that_is_pinned(tiny_export: Path, tmp_path: Path):
    """With SONIC: two chats at once are chats alone; one that is broken off behind its pin cannot be taken back."""
    parts = built("sonic", tiny_export, tmp_path / "b")
    server = scheduler(parts)
    messages: dict[str, list[Message]] = {
        name: [{"role": "system", "content": f"You are {name}."}] for name in ("Ann", "Bob")
    }
    for text in ("Hello", "Why? " * 12, "And then?"):
        heard = {name: Heard() for name in messages}
        for name, each in heard.items():
            messages[name].append({"role": "user", "content": text})
            server.submit(None, Request(messages=messages[name], max_new_tokens=8), each)
        run(server)
        for name, each in heard.items():
            messages[name].append({"role": "assistant", "content": each.text})
    for name, said in messages.items():
        session = open_session(parts.bundle, budget=0.25, threads=1)
        chat = Chat(session, parts.tokenizer, parts.bundle.manifest.model.eos_token_ids, f"You are {name}.")
        asked = [message["content"] for message in said if message["role"] == "user"]
        replies = [message["content"] for message in said if message["role"] == "assistant"]
        assert [chat.say(text, max_new_tokens=8).text for text in asked] == replies
        assert session.stats.runs > 0
    broken = Heard()
    turn = server.submit("Cy", Request(messages=messages["Ann"][:2], max_new_tokens=100), broken)
    while not broken.events:
        server.advance()
    turn.cancel()
    run(server)
    assert broken.end and broken.end.left == "dropped" and server.held().sessions == 2

"""Calls that send whole conversations, as OpenAI's clients do: which session goes on, and with what."""

from __future__ import annotations

import pytest

from semkv_deploy.model.template import Message
from semkv_deploy.runtime.chat import Chat
from semkv_deploy.runtime.open import open_session
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Request

from .schedulers import Heard, Parts, run, scheduler

SYSTEM: Message = {"role": "system", "content": "Be brief."}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(heard: Heard) -> Message:
    return {"role": "assistant", "content": heard.text}


def ask(server: Scheduler, messages: list[Message], session: str | None = None) -> Heard:
    heard = Heard()
    server.submit(session, Request(messages=messages, max_new_tokens=8), heard)
    run(server)
    return heard


def cached(heard: Heard) -> int:
    assert heard.end is not None and heard.end.error is None, heard.end
    return heard.end.cached_tokens


def test_two_conversations_go_on_and_are_chats(parts: Parts):
    """Three turns of each in turn: what is said is what `Chat` says on a session of its own."""
    server = scheduler(parts)
    asked = {"a": ["Hello", "Why?", "And then?"], "b": ["Hello", "Who?", "Where?"]}
    messages: dict[str, list[Message]] = {"a": [SYSTEM], "b": [SYSTEM]}
    for turn in range(3):
        for name, texts in asked.items():
            messages[name].append(user(texts[turn]))
            messages[name].append(said(ask(server, messages[name])))
    for name, texts in asked.items():
        session = open_session(parts.bundle, budget=0.25, threads=1)
        chat = Chat(session, parts.tokenizer, parts.bundle.manifest.model.eos_token_ids, SYSTEM["content"])
        assert [chat.say(text, max_new_tokens=8).text for text in texts] == [
            message["content"] for message in messages[name] if message["role"] == "assistant"
        ]
    # The first turns are alike until the replies: the second of "b" goes on with either session.
    assert server.held().sessions == 2


@pytest.mark.parametrize("change", ["reply", "question", "system", "shorter", "same"])
def test_what_does_not_go_on_with_a_session_begins_anew(change: str, parts: Parts):
    server = scheduler(parts)
    first = ask(server, [SYSTEM, user("Hello")])
    whole = [SYSTEM, user("Hello"), said(first), user("Why?")]
    changed = {
        "reply": [*whole[:2], {"role": "assistant", "content": first.text + "!"}, whole[3]],
        "question": [SYSTEM, user("Hallo"), *whole[2:]],
        "system": whole[1:],
        "shorter": whole[:2],
        "same": whole[:3],
    }[change]
    assert cached(ask(server, changed)) == 0
    assert cached(ask(server, whole)) > 0, "the session is as it was"


def test_a_running_session_is_not_gone_on_with(parts: Parts):
    """Two calls with the same conversation at once: one goes on, the other has a session of its own."""
    server = scheduler(parts)
    whole = [user("Hello"), said(ask(server, [user("Hello")])), user("Why?")]
    heard = [Heard(), Heard()]
    for each in heard:
        server.submit(None, Request(messages=whole, max_new_tokens=8), each)
    run(server)
    assert sorted(cached(each) > 0 for each in heard) == [False, True]


def test_the_longest_is_gone_on_with(parts: Parts):
    server = scheduler(parts)
    ask(server, [user("Hello")], "short")
    whole = [user("Hello")]
    whole += [said(ask(server, whole, "long")), user("Why?")]
    ask(server, whole[-1:], "long")
    short = cached(ask(server, whole))
    assert short > 0
    whole += [said(ask(server, whole)), user("And then?")]
    assert cached(ask(server, whole)) > short


def test_a_session_of_messages_takes_no_tokens(parts: Parts):
    server, refused = scheduler(parts), Heard()
    ask(server, [user("Hello")], "a")
    server.submit("a", Request(text="Hello"), refused)
    run(server)
    assert "a session is of messages or of tokens, from its first turn on (expected messages)" in refused.error


def test_an_evicted_conversation_begins_anew_with_all_its_messages(parts: Parts):
    server = scheduler(parts, batch=1, on_full="forget")
    whole = [user("Hello")]
    first = ask(server, whole)
    ask(server, [user("Somebody else")])
    whole += [said(first), user("Why?")]
    fresh = scheduler(parts, batch=1)
    assert cached(again := ask(server, whole)) == 0 and again.ids == ask(fresh, whole).ids

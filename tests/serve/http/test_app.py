"""OpenAI's client against a server: what it is told is what a chat and a session of their own give."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from semkv_deploy.runtime.chat import Chat, complete
from semkv_deploy.runtime.open import open_session

from ..schedulers import Parts, scheduler
from .conftest import Served, serving

openai = pytest.importorskip("openai", reason="the client is not installed")

ASKED = ["Hello", "Why?", "And then?"]


def chat_alone(parts: Parts, texts: list[str], count: int = 12) -> list[str]:
    session = open_session(parts.bundle, budget=0.25, threads=1)
    chat = Chat(session, parts.tokenizer, parts.bundle.manifest.model.eos_token_ids, "Be brief.")
    return [chat.say(text, max_new_tokens=count).text for text in texts]


def converse(client: Any, texts: list[str], *, stream: bool, count: int = 12) -> tuple[list[str], list[Any]]:
    """Replies and usages of a conversation; every call sends all messages."""
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    replies, usages = [], []
    for text in texts:
        messages.append({"role": "user", "content": text})
        given: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": count}
        if stream:
            chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
            assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
            assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]][-1] in ("length", "stop")
            replies.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]))
            usages.append(chunks[-1].usage)
        else:
            answer = client.chat.completions.create(**given)
            replies.append(answer.choices[0].message.content)
            usages.append(answer.usage)
        messages.append({"role": "assistant", "content": replies[-1]})
    return replies, usages


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_conversation_goes_on_with_its_session(stream: bool, served: Served, parts: Parts):
    replies, usages = converse(served.client(), ASKED, stream=stream)
    assert replies == chat_alone(parts, ASKED)
    # Of each prompt the session had seen all but what is new.
    seen = [usage.prompt_tokens for usage in usages]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached[0] == 0 and seen[0] < cached[1] < seen[1] < cached[2] < seen[2]
    assert all(0 < usage.completion_tokens <= 12 for usage in usages)
    assert all(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in usages)


def test_conversations_at_once(served: Served, parts: Parts):
    """Six on four rows, streamed: those that lose their row begin anew, and every first reply is right."""
    heard: dict[int, list[str]] = {}

    def one(number: int) -> None:
        heard[number] = converse(served.client(), [f"Number {number}", "Why?"], stream=True)[0]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [heard[number][0] for number in range(6)] == [chat_alone(parts, [f"Number {n}"])[0] for n in range(6)]
    assert all(len(replies) == 2 for replies in heard.values())


def test_completions(served: Served, parts: Parts):
    """Prompts as texts and as ids, several at once, whole and streamed; their rows are free afterwards."""
    prompts = ["Once upon a time", "The answer is"]
    expected = []
    for text in prompts:
        session = open_session(parts.bundle, budget=0.25, threads=1)
        expected.append(complete(session, parts.tokenizer, parts.tokenizer.encode(text), max_new_tokens=10).text)
    client = served.client()
    given: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 10}
    used = served.scheduler.held().sessions
    answer = client.completions.create(prompt=prompts, **given)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 20 and answer.choices[0].finish_reason == "length"
    ids = client.completions.create(prompt=parts.tokenizer.encode(prompts[1]), **given)
    assert ids.choices[0].text == expected[1]
    texts = ["", ""]
    for chunk in client.completions.create(prompt=prompts, **given, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected and served.scheduler.held().sessions <= used


def test_sampling_parameters_reach_the_sampler(served: Served):
    client = served.client()

    def say(**given: Any) -> str:
        asked = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 1.5, **given}
        return str(client.completions.create(**asked).choices[0].text)

    assert say(seed=5) == say(seed=5) != say(seed=6)
    assert say(seed=-1) == say(seed=-1), "OpenAI's seeds are signed"
    greedy = say(temperature=0)
    assert say(top_p=1e-6, seed=1) == greedy and say(extra_body={"top_k": 1}, seed=1) == greedy
    assert len({say() for _ in range(4)}) > 1, "without a seed each is another"
    assert say(temperature=0, stop=[greedy[4:6]]) == greedy[: greedy.index(greedy[4:6])]


def test_a_stop_text_is_a_stop(served: Served):
    client = served.client()
    given: dict[str, Any] = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**given).choices[0].text
    stopped = client.completions.create(**given, stop=text[5:8]).choices[0]
    assert stopped.finish_reason == "stop" and text[5:8] not in stopped.text


USER = [{"role": "user", "content": "Hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BAD: dict[str, tuple[str, Any, int, str | None, str | None]] = {
    "no JSON": (CHAT, b"{", 400, None, None),
    "no object": (CHAT, [1], 400, None, None),
    "another model": (CHAT, {"model": "gpt", "messages": USER}, 404, "model", "model_not_found"),
    "no messages": (CHAT, {"messages": []}, 400, "messages", None),
    "a reply last": (CHAT, {"messages": [*USER, {"role": "assistant", "content": "a"}]}, 400, "messages", None),
    "an unknown role": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role", None),
    "a picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        400,
        "messages.0.content.0.type",
        None,
    ),
    "no content": (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content", None),
    "tools": (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    "two answers": (CHAT, {"messages": USER, "n": 2}, 400, "n", "unsupported_parameter"),
    "true for one": (CHAT, {"messages": USER, "n": True}, 400, "n", "unsupported_parameter"),
    "JSON mode": (
        CHAT,
        {"messages": USER, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "unsupported_parameter",
    ),
    "an unknown parameter": (CHAT, {"messages": USER, "tempreature": 1}, 400, "tempreature", None),
    "a temperature of text": (CHAT, {"messages": USER, "temperature": "1"}, 400, "temperature", None),
    "NaN": (CHAT, b'{"model": "tiny", "temperature": NaN}', 400, None, None),
    "top_p of 0": (CHAT, {"messages": USER, "top_p": 0}, 400, "top_p", None),
    "an empty stop": (CHAT, {"messages": USER, "stop": ["a", ""]}, 400, "stop.1", None),
    "no tokens": (CHAT, {"messages": USER, "max_tokens": 0}, 400, "max_tokens", None),
    "too many tokens": (CHAT, {"messages": USER, "max_completion_tokens": 301}, 400, "max_completion_tokens", None),
    "usage without stream": (
        CHAT,
        {"messages": USER, "stream_options": {"include_usage": True}},
        400,
        "stream_options",
        None,
    ),
    "a long conversation": (
        CHAT,
        {"messages": [{"role": "user", "content": "long " * 600}]},
        400,
        None,
        "context_length_exceeded",
    ),
    "a long one, streamed": (
        CHAT,
        {"messages": [{"role": "user", "content": "long " * 600}], "stream": True},
        400,
        None,
        "context_length_exceeded",
    ),
    "a long body": (CHAT, {"messages": [{"role": "user", "content": "long " * 6000}]}, 413, None, None),
    "no prompt": (TEXT, {"prompt": ""}, 400, "prompt", None),
    "an unknown id": (TEXT, {"prompt": [512]}, 400, None, None),
    "logprobs": (TEXT, {"prompt": "a", "logprobs": 1}, 400, "logprobs", "unsupported_parameter"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, served: Served):
    path, body, status, param, code = BAD[name]
    named = {"model": "tiny", **body} if isinstance(body, dict) else body
    data = named if isinstance(named, bytes) else json.dumps(named)
    answer = served.post(path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code) and error["type"] == "invalid_request_error"
    assert error["message"].endswith(".") and "Traceback" not in error["message"]


def test_parameters_that_ask_for_nothing_are_taken(served: Served):
    given = {"n": 1, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "metadata": {"a": "b"}, "tools": []}
    message = {"role": "user", "content": [{"type": "text", "text": "Hello"}], "refusal": None, "tool_calls": []}
    body = {"model": "tiny", "messages": [message], "max_tokens": 3, "response_format": {"type": "text"}, **given}
    assert served.post(CHAT, json=body).status_code == 200


def test_keys_routes_and_kinds_of_body(served: Served):
    import httpx

    with pytest.raises(openai.AuthenticationError, match="a wrong API key, or none"):
        served.client(api_key="wrong").models.list()
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert served.get("/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found."
    assert served.get(CHAT).status_code == 405
    form = served.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert form.status_code == 415 and "application/json" in form.json()["error"]["message"]


def test_models(served: Served):
    (model,) = served.client().models.list().data
    assert model.id == "tiny" and model.max_model_len == 512 and model.budget == 0.25
    assert served.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
        served.client().models.retrieve("other")


def test_metrics(served: Served):
    before = served.get("/metrics").text
    served.client().completions.create(model="tiny", prompt="Once", max_tokens=5)
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")

    def turns(text: str) -> float:
        return float(text.split("\nsemkv_turns_total ")[1].split("\n")[0])

    assert turns(answer.text) == turns(before) + 1 and "semkv_rows 4\n" in answer.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_frees_its_row(stream: bool, served: Served):
    import httpx

    before, ended = served.scheduler.statistics.cancelled, served.scheduler.statistics.turns
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 300, "temperature": 0, "stream": stream}
    headers = {"authorization": "Bearer sesame"}
    if stream:
        with httpx.stream("POST", f"{served.url}{TEXT}", json=body, headers=headers, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}{TEXT}", json=body, headers=headers, timeout=httpx.Timeout(60, read=0.05))
    end = time.monotonic() + 20
    while served.scheduler.statistics.turns == ended and time.monotonic() < end:
        time.sleep(0.01)
    assert served.scheduler.statistics.cancelled == before + 1 and served.scheduler.held().running == 0


def test_no_row_is_an_error_that_clients_try_again_after(parts: Parts):
    """One row that holds an idle session, and sessions are not forgotten: 503, and an event where it is too late."""
    with serving(scheduler(parts, batch=1)) as server:
        client = server.client()
        client.chat.completions.create(model="tiny", messages=USER, max_tokens=3)
        with pytest.raises(openai.InternalServerError, match="no row is free") as caught:
            client.chat.completions.create(model="tiny", messages=USER, max_tokens=3)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "unavailable"


def test_a_failure_in_a_stream_is_an_event(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    with serving(scheduler(parts, batch=1)) as server:
        step, calls = server.scheduler.session.step, []

        def failing(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 4:
                raise RuntimeError("out of luck")
            return step(*arguments)

        monkeypatch.setattr(server.scheduler.session, "step", failing)
        given = {"model": "tiny", "prompt": "Once", "max_tokens": 50, "temperature": 0}
        with pytest.raises(openai.APIError, match="internal RuntimeError: out of luck"):
            list(server.client().completions.create(**given, stream=True))
        calls.clear()
        with pytest.raises(openai.InternalServerError, match="out of luck") as caught:
            server.client().completions.create(**given)
        assert caught.value.status_code == 500
        assert server.client().completions.create(**{**given, "max_tokens": 3}).choices[0].text


def test_health_says_that_the_scheduler_failed(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    with serving(scheduler(parts, batch=1)) as server:

        def mistaken(*arguments: Any) -> None:
            raise ZeroDivisionError("a mistake")

        monkeypatch.setattr(server.scheduler._table, "expire", mistaken)
        with pytest.raises(openai.InternalServerError, match="a mistake"):
            server.client().completions.create(model="tiny", prompt="Once")
        assert server.get("/health").status_code == 503

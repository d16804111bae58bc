"""model.py as the repository has it, run on a stand-in of Triton's Python backend."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.runtime.chat import Chat
from semkv_deploy.runtime.open import open_session
from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.triton.repository import write_repository

from ..schedulers import Parts, alone, prompt
from . import fake
from .config import parse

START, END = 1, 2


def loaded(model: Path, **parameters: str) -> Any:
    """An initialized instance, from the files that Triton would read."""
    spec = importlib.util.spec_from_file_location("model", model / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = parse((model / "config.pbtxt").read_text(encoding="utf-8"))
    config["parameters"].update({name: {"string_value": value} for name, value in parameters.items()})
    instance = module.TritonPythonModel()
    instance.initialize({"model_config": json.dumps(config), "model_repository": str(model), "model_version": "1"})
    return instance


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repository")
    return write_repository(tiny_bundle, out, "chat", ServingOptions(threads=1, wait_seconds=0), budget=0.25)


@pytest.fixture(scope="module")
def model(repository: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", fake)
        instance = loaded(repository)
        yield instance
        instance.finalize()


def run(model: Any, *requests: fake.Request) -> list[fake.Sender]:
    model.execute(list(requests))
    assert all(request.sender.ended.wait(60) for request in requests)
    return [request.sender for request in requests]


def test_sessions_by_name_and_by_sequence(model: Any, parts: Parts):
    """Two conversations at once, past the capacity: each is what it is alone; a response a token."""
    turns = [[prompt(10 * s + t, 45) for t in range(3)] for s in range(2)]
    heard: list[list[fake.Sender]] = []
    for turn in range(3):
        first, last = turn == 0, turn == 2
        heard.append(
            run(
                model,
                fake.Request(
                    session_id="a", input_ids=turns[0][turn], max_tokens=8, start_session=first, end_session=last
                ),
                fake.Request(17, START * first | END * last, input_ids=turns[1][turn], max_tokens=8),
            )
        )
    for number in range(2):
        senders = [each[number] for each in heard]
        assert [sender.ids for sender in senders] == alone(parts, turns[number], 8, (1,))
        assert [len(response.outputs["output_ids"]) for response in senders[0].responses] == [1] * 8 + [0]
        assert senders[2].responses[-1].outputs["finish_reason"] == [b"length"]
        assert senders[2].responses[-1].outputs["cached_tokens"][0] > 0
    for gone in (fake.Request(session_id="a", input_ids=[5]), fake.Request(17, input_ids=[5])):
        assert run(model, gone)[0].error.code is fake.Code.NOT_FOUND


def test_a_chat(model: Any, parts: Parts):
    session = open_session(parts.bundle, budget=0.25, threads=1)
    chat = Chat(session, parts.tokenizer, parts.bundle.manifest.model.eos_token_ids, "Be brief.")
    (first,) = run(
        model,
        fake.Request(session_id="c", text_input="Hello", system="Be brief.", max_tokens=8, start_session=True),
    )
    (second,) = run(model, fake.Request("c2", text_input="Why?", session_id="c", max_tokens=8, end_session=True))
    assert [first.text, second.text] == [chat.say(text, max_new_tokens=8).text for text in ("Hello", "Why?")]


def test_a_turn_that_stands_alone_in_one_response(model: Any):
    before = model._scheduler.held().sessions
    streamed, whole, raw = run(
        model,
        fake.Request(text_input="Hello", max_tokens=8),
        fake.Request(text_input="Hello", max_tokens=8, stream=False),
        fake.Request(text_input="Hello", max_tokens=8, stream=False, raw=True),
    )
    assert len(whole.responses) == 1 and whole.ids == streamed.ids != raw.ids and whole.text == streamed.text
    prompts = [sender.responses[-1].outputs["prompt_tokens"][0] for sender in (whole, raw)]
    assert prompts[0] > prompts[1] and model._scheduler.held().sessions == before


def test_sampling_parameters(model: Any):
    def ids(**given: Any) -> list[int]:
        return run(model, fake.Request(input_ids=[5, 6, 7], max_tokens=12, **given))[0].ids

    greedy = ids()
    assert ids(temperature=2.0, seed=1) == ids(temperature=2.0, seed=1) != ids(temperature=2.0, seed=2)
    assert ids(temperature=2.0, top_k=1) == ids(temperature=2.0, top_p=1e-6) == greedy
    assert ids(stop_ids=[greedy[3]]) == greedy[: greedy.index(greedy[3])]
    assert len({tuple(ids(temperature=2.0)) for _ in range(3)}) > 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "a turn has a text or tokens (expected one of them, got none)"),
    "both": ({"text_input": "a", "input_ids": [5]}, "got both"),
    "an id the model has not": ({"input_ids": [512]}, "no token of the model has this id"),
    "a long prompt": ({"input_ids": [5] * 600}, "600 more tokens do not fit the context"),
    "a number of tokens": ({"input_ids": [5], "max_tokens": 0}, "max_new_tokens: out of range"),
    "more than fit": ({"input_ids": [5], "max_tokens": 513}, "more tokens than a reply may have"),
    "a temperature": ({"input_ids": [5], "temperature": -1.0}, "--temperature: out of range"),
    "an end without a name": ({"end_session": True}, "a session begins or ends, and has no name"),
    "system without a chat": ({"input_ids": [5], "system": "a"}, "only a chat has a system message"),
    "two texts": ({"text_input": ["a", "b"]}, "text_input: not one element (expected 1, got 2)"),
    "no UTF-8": ({"text_input": b"\xff"}, "text_input: not UTF-8 text"),
    "an empty stop": ({"input_ids": [5], "stop": [""]}, "an empty text would end every reply"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, model: Any):
    inputs, words = BAD[name]
    (sender,) = run(model, fake.Request(**inputs))
    assert sender.error.code is fake.Code.INVALID_ARG and words in sender.error.message
    assert len(sender.responses) == 1


def test_rows_run_out_and_come_back(model: Any):
    taken = [fake.Request(session_id=f"t{n}", start_session=True, input_ids=[5, 6], max_tokens=2) for n in range(4)]
    run(model, *taken)
    (refused,) = run(model, fake.Request(input_ids=[5, 6], max_tokens=2))
    assert refused.error.code is fake.Code.UNAVAILABLE and "no row is free" in refused.error.message
    ended = run(model, *(fake.Request(session_id=f"t{number}", end_session=True) for number in range(4)))
    assert [sender.responses[0].outputs["finish_reason"] for sender in ended] == [[b"ended"]] * 4
    assert run(model, fake.Request(input_ids=[5, 6], max_tokens=2))[0].ids


def test_a_client_that_goes_frees_its_row(model: Any):
    request = fake.Request(input_ids=[5, 6], max_tokens=500)
    model.execute([request])
    request.sender.cancelled = True
    assert request.sender.ended.wait(20) and request.sender.error.code is fake.Code.CANCELLED
    assert len(request.sender.ids) < 500 and model._scheduler.held().running == 0


def test_a_look_that_fails_is_not_the_last(model: Any, monkeypatch: pytest.MonkeyPatch):
    """Else no client's leaving would be seen any more."""
    failed, update = threading.Event(), model._metrics.update

    def failing(scheduler: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("no metrics today")
        update(scheduler)

    monkeypatch.setattr(model._metrics, "update", failing)
    assert failed.wait(20)
    test_a_client_that_goes_frees_its_row(model)


def test_a_request_that_cannot_be_asked_hides_no_other(model: Any, monkeypatch: pytest.MonkeyPatch):
    odd, request = (fake.Request(input_ids=[5, 6], max_tokens=500) for _ in range(2))
    monkeypatch.setattr(odd.sender, "is_cancelled", lambda: 1 / 0)
    model.execute([odd, request])
    request.sender.cancelled = True
    assert request.sender.ended.wait(20) and request.sender.error.code is fake.Code.CANCELLED
    assert odd.sender.ended.wait(20) and odd.sender.responses[-1].error is None


def test_failures_are_told_and_metrics_count_them(model: Any, monkeypatch: pytest.MonkeyPatch):
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(model._scheduler.session, "step", failing)
        (sender,) = run(model, fake.Request(input_ids=[5, 6], max_tokens=5))
    assert sender.error.code is fake.Code.INTERNAL and "out of luck" in sender.error.message
    counted = model._scheduler.statistics
    end = time.monotonic() + 20
    metrics = fake.MetricFamily.metrics
    while metrics["semkv_failed_total"].value() != counted.failed and time.monotonic() < end:
        time.sleep(0.01)
    assert metrics["semkv_failed_total"].value() == counted.failed > 0
    assert metrics["semkv_new_tokens_total"].value() == counted.new_tokens and metrics["semkv_rows"].value() == 4


def test_sessions_are_saved_when_the_model_is_unloaded(
    repository: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    turns, replies = [prompt(t, 60) for t in range(2)], []
    for number, ids in enumerate(turns):
        model = loaded(repository, rows="1", save_sessions=str(tmp_path))
        request = fake.Request(session_id="a", input_ids=ids, max_tokens=6, start_session=number == 0)
        replies.append(run(model, request)[0].ids)
        model.finalize()
    assert replies == alone(parts, turns, 6, (1,))

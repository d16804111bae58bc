"""Turns in texts over libsemkv's scheduler: tokens and pieces of text are those of Python's scheduler."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.runtime.open import open_session
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Finished, Request

from ..serve.schedulers import Heard, Parts, run
from .test_scheduler import INVALID, schedule
from .test_text import libraries, trained, with_tokenizer

Turn = dict[str, Any]


def user(text: str, **more: Any) -> Turn:
    return {"messages": [{"role": "user", "content": text}], "most": 12, **more}


CHAT: list[Turn] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief.\nAnd kind: ä 👍."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        "most": 12,
    },
    user("And at night? It is dark, and stars are there to be seen where no clouds are."),
    user(" “quoted”\n"),
    user("Again, and at length, so that there is something to be compressed. " * 3),
    user("<b>"),
]


def in_python(bundle: Path, turns: list[Turn]) -> list[dict[str, Any]]:
    """The same turns of one session over Python's scheduler: ids, pieces of text, and how each ended."""
    parts = Parts.of(bundle)
    session = open_session(parts.bundle, budget=0.5, threads=1)
    stops = tuple(parts.bundle.manifest.model.eos_token_ids)
    server, replies = Scheduler(session, parts.tokenizer, stop_ids=stops, form=parts.form), []
    for turn in turns:
        heard = Heard()
        given = {name: turn[name] for name in ("ids", "text", "messages", "stop") if name in turn}
        server.submit("a", Request(**given, max_new_tokens=turn["most"]), heard)
        run(server)
        pieces, end = heard.events[:-1], heard.events[-1]
        assert isinstance(end, Finished)
        replies.append(
            {
                "ids": heard.ids,
                "pieces": [piece.text for piece in pieces],
                "reason": end.reason,
                "prompt_tokens": end.prompt_tokens,
                "cached_tokens": end.cached_tokens,
            }
        )
    return replies


def in_cpp(program: Path, bundle: Path, turns: list[Turn]) -> list[dict[str, Any]]:
    given = [{"session": "a", **turn} for turn in turns]
    found = schedule(program, bundle, [given], rows=1, genai=libraries()["genai"])["callers"][0]
    assert [reply["error"] for reply in found] == [""] * len(turns)
    return [{name: value for name, value in each.items() if name not in ("fault", "error")} for each in found]


@pytest.fixture(scope="module")
def program(driver: Path) -> Path:
    return driver.parent / "semkv_schedule"


@pytest.mark.parametrize("name", ["semanticache", "sonic"])
def test_a_chat_is_pythons(name: str, program: Path, bundle_of: Callable[..., Path]):
    """Past the capacity; SONIC keeps the system message for good."""
    bundle = bundle_of(name)
    replies = in_cpp(program, bundle, CHAT)
    assert replies == in_python(bundle, CHAT)
    assert any(piece for reply in replies for piece in reply["pieces"])


def test_texts_as_they_are_and_ids(program: Path, bundle_of: Callable[..., Path]):
    """A session of tokens is given them either way, and its replies have texts as well."""
    bundle = bundle_of("semanticache")
    turns: list[Turn] = [
        {"text": "Once upon a time, ", "most": 20},
        {"ids": [5, 6, 7], "most": 20},
        {"text": "<|im_end|> and 漢字", "most": 20},
    ]
    assert in_cpp(program, bundle, turns) == in_python(bundle, turns)


def test_a_text_alone_begins_as_its_tokenizer_says(program: Path, tiny_bundle: Path, tmp_path: Path):
    """Llama's puts a token before it; between a reply and the next turn of a chat there is none."""
    bundle = with_tokenizer(tiny_bundle, trained("llama3", tmp_path / "tokenizer"), tmp_path / "bundle")
    turns: list[Turn] = [{"text": "A b", "most": 3}]
    replies = in_cpp(program, bundle, turns)
    assert replies == in_python(bundle, turns)
    alone = len(Parts.of(bundle).tokenizer.encode("A b", add_special_tokens=False))
    assert replies[0]["prompt_tokens"] == alone + 1


def test_a_stop_text_ends_a_reply_in_the_middle_of_a_token(program: Path, bundle_of: Callable[..., Path]):
    """Over the boundaries of tokens; the cache has what came before, so that the next turn goes on alike."""
    bundle = bundle_of("semanticache")
    first = in_python(bundle, CHAT[:1])[0]
    text = "".join(first["pieces"])
    assert len(first["pieces"]) > 6 and len(text) > 8
    for begin, end in ((3, 7), (4, 5), (len(text) - 3, len(text)), (1, len(text))):
        stop = text[begin:end]
        turns = [{**CHAT[0], "stop": ["never said", stop]}, CHAT[1]]
        replies = in_cpp(program, bundle, turns)
        assert replies == in_python(bundle, turns), stop
        assert "".join(replies[0]["pieces"]) == text[: text.index(stop)] and replies[0]["reason"] == "stop"
    # What may be the beginning of one is held back, and given out where it was none.
    turns = [{**CHAT[0], "stop": [text[2:] + "!"]}]
    replies = in_cpp(program, bundle, turns)
    assert replies == in_python(bundle, turns) and "".join(replies[0]["pieces"]) == text
    # An added token has no text that would be found.
    turns = [{"text": "a", "most": 4, "stop": ["<|im_end|>"]}]
    assert in_cpp(program, bundle, turns) == in_python(bundle, turns)


def test_a_chat_that_was_broken_off_goes_on(program: Path, bundle_of: Callable[..., Path]):
    """Taken back: the next message is the first one's successor, as if there had been none between."""
    bundle = bundle_of("semanticache")
    gone = {**CHAT[2], "session": "a", "most": 50, "gone_after": 3}
    given = [{"session": "a", **CHAT[0]}, gone, {"session": "a", **CHAT[1]}]
    found = schedule(program, bundle, [given], rows=1, genai=libraries()["genai"])["callers"][0]
    assert [each["reason"] for each in found][1] == "cancelled"
    wanted = in_python(bundle, CHAT[:2])
    assert [found[0]["pieces"], found[2]["pieces"]] == [each["pieces"] for each in wanted]


def test_what_is_refused(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    bundle = bundle_of("semanticache")
    refused: list[tuple[Turn, str]] = [
        ({"ids": [5], "text": "a"}, "request: a turn has one of ids, text and messages (got ids and text)."),
        ({}, "request: a turn has one of ids, text and messages (got none)."),
        ({"ids": [5], "stop": ["a", ""]}, "stop: an empty text would end every reply."),
        ({"session": "chat", "ids": [5]}, "session chat: a session is of messages or of tokens, from its first turn"),
        ({"session": "chat", "text": "a"}, "(expected messages)"),
        ({"session": "ids", **user("a")}, "(expected ids or text)"),
        (user("a " * 600), "more tokens do not fit the context"),
    ]
    begun = [{"session": "chat", **user("a")}, {"session": "ids", "ids": [5], "most": 1}]
    turns = [*begun, *(turn for turn, _ in refused)]
    found = schedule(program, bundle, [turns], rows=4, genai=libraries()["genai"])["callers"][0]
    for (_, sentence), reply in zip(refused, found[2:], strict=True):
        assert reply["fault"] == INVALID and sentence in reply["error"], reply
    # Without the library texts are refused, and ids have texts all the same.
    turns = [{"text": "a"}, user("a"), {"ids": [5, 6], "most": 12}]
    found = schedule(program, bundle, [turns], rows=1)["callers"][0]
    assert [each["fault"] for each in found] == [INVALID, INVALID, -1]
    assert "onnxruntime-genai was not loaded" in found[0]["error"]
    wanted = in_python(bundle, turns[2:])
    assert found[2]["pieces"] == wanted[0]["pieces"] and any(found[2]["pieces"])


def test_a_template_that_takes_no_system_message(program: Path, tiny_bundle: Path, tmp_path: Path):
    tokenizer = Path(shutil.copytree(tiny_bundle / "tokenizer", tmp_path / "tokenizer"))
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none here') }}{% endif %}x"
    (tokenizer / "chat_template.jinja").write_text(template, encoding="utf-8")
    bundle = with_tokenizer(tiny_bundle, tokenizer, tmp_path / "bundle")
    found = schedule(program, bundle, [CHAT[:1]], rows=1, genai=libraries()["genai"])["callers"][0]
    assert "system: the model's chat template takes no system message. Leave it out" in found[0]["error"]


def test_a_model_without_a_chat_template(program: Path, tiny_bundle: Path, tmp_path: Path):
    tokenizer = Path(shutil.copytree(tiny_bundle / "tokenizer", tmp_path / "tokenizer"))
    (tokenizer / "chat_template.jinja").unlink()
    bundle = with_tokenizer(tiny_bundle, tokenizer, tmp_path / "bundle")
    turns = [CHAT[0], {"text": "a", "most": 2}]
    found = schedule(program, bundle, [turns], rows=1, genai=libraries()["genai"])["callers"][0]
    assert "messages: the tokenizer has no chat template" in found[0]["error"] and found[1]["error"] == ""

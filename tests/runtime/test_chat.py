"""Chats of twenty turns on published forms of templates: what the cache holds, what ends a reply, what is shown."""

from __future__ import annotations

from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.chat import Chat, complete
from semkv_deploy.runtime.sampling import Sampler
from tests.chat_templates import CHATML, FORMS, GEMMA, GLM4, QWEN3, Form, ScriptedSession, byte_tokenizer

VOCABULARY = 300
THOUGHT = "<think>\nSo,\n</think>\n\n"


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def made(form: Form, replies: list[str], **options: Any) -> tuple[Chat, ScriptedSession, Any]:
    """A chat whose replies are scripted; each ends with the form's end token."""
    tokenizer = byte_tokenizer(form.template, form.special, form.eos)
    script = [encode(tokenizer, reply + form.end) for reply in replies]
    session: Any = ScriptedSession(script, VOCABULARY)
    return Chat(session, tokenizer, [tokenizer.eos_token_id], **options), session, tokenizer


def text_of(tokenizer: Any, session: ScriptedSession) -> str:
    return str(tokenizer.decode(session.cache, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.verbatim])
def test_twenty_turns_are_what_the_template_says(name: str):
    """Where the template shows replies as given, the cache holds its rendering, up to the last reply's end."""
    form = FORMS[name]
    chat, session, tokenizer = made(form, [f"Reply {turn}." for turn in range(20)])
    messages = []
    for turn in range(20):
        question = f"Question {turn}?"
        reply = chat.say(question, max_new_tokens=30)
        assert reply.text == f"Reply {turn}."
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply.text}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
        held = text_of(tokenizer, session)
        assert expected.startswith(held)
        assert expected[len(held) :].strip() == (form.end if form is not GLM4 else "")
    assert session.turns == 20


@pytest.mark.parametrize(
    ("name", "reply", "between"),
    [
        ("qwen3", THOUGHT + "Yes.", "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
        ("r1", "So,\n</think>\n\nYes.", "<|end_of_sentence|><|User|>{}<|Assistant|><think>\n"),
        ("mistral", " Yes. ", "</s>[INST] {} [/INST]"),
        ("llama3", "\n Yes. \n", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma", "Yes.\n\n", "<end_of_turn>\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"),
        ("chatml", "", "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
    ],
)  # fmt: skip
def test_rewritten_replies_stay_as_generated_for_twenty_turns(name: str, reply: str, between: str):
    """Templates that drop thinking, trim or re-space old turns: the cache keeps the reply, and one end of turn."""
    form = FORMS[name]
    chat, session, tokenizer = made(form, [reply] * 20)
    opening = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q0"}], tokenize=False, add_generation_prompt=True
    )
    expected = opening + reply
    for turn in range(20):
        chat.say(f"Q{turn}", max_new_tokens=60)
        if turn:
            expected += between.format(f"Q{turn}") + reply
        assert text_of(tokenizer, session) == expected


@pytest.mark.parametrize("name", FORMS)
def test_the_token_that_ends_a_turn_stops_a_reply(name: str):
    """No configuration names it: the template writes it after a reply."""
    form = FORMS[name]
    tokenizer = byte_tokenizer(form.template, form.special, form.eos)
    session: Any = ScriptedSession([encode(tokenizer, "Hi" + form.end + "more")], VOCABULARY)
    reply = Chat(session, tokenizer, []).say("Q", max_new_tokens=20)
    assert reply.text == reply.cached == "Hi"


def test_a_reply_cut_by_its_length_is_ended_by_the_template():
    chat, session, tokenizer = made(CHATML, ["A long reply", "B"])
    assert chat.say("one", max_new_tokens=6).text == "A long"
    chat.say("two", max_new_tokens=6)
    assert text_of(tokenizer, session).count("A long<|im_end|>\n<|im_start|>user\ntwo<|im_end|>") == 1


@pytest.mark.parametrize("form", [CHATML, QWEN3])
def test_another_end_of_text_does_not_double_the_end_of_turn(form: Form):
    tokenizer = byte_tokenizer(form.template, form.special)
    session: Any = ScriptedSession([encode(tokenizer, "Hi<eos>"), encode(tokenizer, "Ho<eos>")], VOCABULARY)
    chat = Chat(session, tokenizer, [tokenizer.eos_token_id])
    chat.say("one", max_new_tokens=6)
    chat.say("two", max_new_tokens=6)
    assert "<eos>" not in text_of(tokenizer, session)
    assert "Hi<|im_end|>\n<|im_start|>user\ntwo" in text_of(tokenizer, session)


def test_a_system_message_that_is_refused():
    chat, _, _ = made(GEMMA, ["Hi"], system="Be brief.")
    with pytest.raises(SemkvError, match="--system: the model's chat template takes no system message") as error:
        chat.say("Q", max_new_tokens=4)
    assert "System role not supported" in str(error.value)


def test_a_refused_message_leaves_the_chat_as_it_was():
    chat, session, tokenizer = made(CHATML, ["Hi", "Ho"], vocab_size=VOCABULARY)
    chat.say("one", max_new_tokens=9)
    before, messages = list(session.cache), list(chat.messages)
    tokenizer.add_tokens([f"<t{i}>" for i in range(60)])
    with pytest.raises(SemkvError, match=r"does not have .*expected ids below 300, got <t59>"):
        chat.say("call <t59>", max_new_tokens=9)
    assert session.cache == before and chat.messages == messages
    assert chat.say("two", max_new_tokens=9).text == "Ho"


def test_a_template_that_hides_replies():
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    chat, _, _ = made(Form(template, (), "<eos>"), ["Hi", "Ho"])
    chat.say("one", max_new_tokens=4)
    with pytest.raises(SemkvError, match="does not show replies"):
        chat.say("two", max_new_tokens=4)


def test_a_template_that_wants_thinking_in_replies():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and '</think>' not in m.content %}"
        "{{ raise_exception('no thinking') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat, session, tokenizer = made(CHATML._replace(template=template), [THOUGHT + "A"] * 3)
    for turn in range(3):
        chat.say(f"Q{turn}", max_new_tokens=40)
    assert text_of(tokenizer, session).count("A<|im_end|>\n<|im_start|>user\nQ") == 2


def test_stop_texts_end_a_reply_and_are_not_shown():
    shown: list[str] = []
    chat, session, tokenizer = made(CHATML, ["One.\n###\nTwo.", "Three"], stop=("###", "unseen"))
    reply = chat.say("Q", max_new_tokens=40, stream=shown.append)
    assert reply.text == "".join(shown) == "One.\n"
    chat.say("R", max_new_tokens=40)
    # Two of the stop text's tokens had been appended when the third completed it; no template writes them.
    assert "One.\n##<|im_end|>\n<|im_start|>user\nR" in text_of(tokenizer, session)


def test_a_stop_text_that_the_template_writes_is_not_doubled():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    chat, session, tokenizer = made(Form(template, (), "<eos>"), ["Hi\nuser: I", "Ho"], stop=("\nuser:",))
    assert chat.say("one", max_new_tokens=40).text == "Hi"
    chat.say("two", max_new_tokens=40)
    assert text_of(tokenizer, session) == "user: one\nassistant: Hi\nuser: two\nassistant: Ho"


def test_a_stop_that_is_a_special_token():
    chat, _, _ = made(QWEN3, ["<think>x</think>Yes"], stop=("</think>",))
    assert chat.say("Q", max_new_tokens=40).text == "x"


def test_a_reply_can_be_broken_off():
    chat, session, tokenizer = made(CHATML, ["A very long reply", "B"])
    asked = iter([False] * 4 + [True] * 9)
    reply = chat.say("one", max_new_tokens=40, cancelled=lambda: next(asked))
    assert (reply.text, reply.cancelled) == ("A ve", True)
    assert chat.say("two", max_new_tokens=4).text == "B"
    assert "A ve<|im_end|>\n<|im_start|>user\ntwo" in text_of(tokenizer, session)


def test_the_context_ends_a_reply():
    tokenizer = byte_tokenizer(None)
    session: Any = ScriptedSession([encode(tokenizer, "abcdefgh")], VOCABULARY, max_context=5)
    reply = complete(session, tokenizer, [1, 2], max_new_tokens=40)
    assert (reply.text, reply.cached, len(session.cache)) == ("abc", "abc", 5)


def test_whole_characters_are_streamed_and_the_rest_at_the_end():
    tokenizer = byte_tokenizer(None)
    text = "é 你好 🙂 \ufffd!"
    shown: list[str] = []
    session: Any = ScriptedSession([[*encode(tokenizer, text), *encode(tokenizer, "🙂")[:2], 256]], VOCABULARY)
    reply = complete(session, tokenizer, [1], max_new_tokens=99, stop_ids=[256], stream=shown.append)
    assert reply.text.startswith(text) and reply.text[len(text) :].strip("\ufffd") == ""
    assert len(reply.text) > len(text)
    assert all("\ufffd" not in piece for piece in shown[: len("é 你好 🙂 ")])
    assert "".join(shown) == reply.text


def test_logits_that_are_no_numbers_are_not_sampled():
    import numpy as np

    for bad in (np.nan, np.inf):
        with pytest.raises(SemkvError, match="not finite"):
            Sampler()(np.array([[0, bad, 1]], np.float32))
    assert Sampler()(np.array([[0, -np.inf, 1]], np.float32)).tolist() == [2]

"""Chat templates rendered in a child process: as transformers renders them, within limits, and never trusted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import ChatTemplate
from tests.chat_templates import CHATML, FORMS, Form, byte_tokenizer

TALK = [
    {"role": "user", "content": " What is <2 & 3>?\n"},
    {"role": "assistant", "content": '<think>\nhm\n</think>\n\nA "pair".  '},
    {"role": "user", "content": "Naïve — 你好 🙂"},
]


def rendered(source: str, messages: list[dict[str, str]] = TALK, **special: str) -> str:
    template = ChatTemplate(source, special)
    try:
        return template.render(messages, add_generation_prompt=True)
    finally:
        template.close()


@pytest.mark.parametrize("name", FORMS)
def test_renders_as_transformers_does(name: str):
    form = FORMS[name]
    tokenizer = byte_tokenizer(form.template, form.special, form.eos)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    for messages, prompt in ((TALK, True), (TALK[:2], False), (TALK[:1], True)):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert template.render(messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson(indent=1) }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ dict(a=1).a }}{{ bos_token }}{{ tools is none }}",
        "  {% if true %}\n    indented\n  {% endif %}\n",
    ],
)
def test_has_what_transformers_environment_has(source: str):
    tokenizer = byte_tokenizer(source)
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert rendered(source, bos_token="<bos>") == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{% for i in range(9999) %}{{ f(0) }}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ range(999999999) | list }}",
    ],
)
def test_time_memory_and_length_are_limited(source: str):
    started = time.monotonic()
    with pytest.raises(SemkvError, match=r"the chat template (does not come to an end|fails)"):
        rendered(source)
    assert time.monotonic() - started < 25


def test_an_endless_template_is_tried_once():
    template = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    with pytest.raises(SemkvError, match="does not come to an end"):
        template.check_ends()
    started = time.monotonic()
    with pytest.raises(SemkvError, match="does not come to an end"):
        template.render(TALK, add_generation_prompt=True)
    assert time.monotonic() - started < 0.1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages | }}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ raise_exception('no \x1b[31mred') }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ namespace(_x=1) }}", "SecurityError"),
        ("{{ dict.__class__ }}{{ dict.mro() }}", "SecurityError|UndefinedError"),
        ("(" * 5 + "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "fails"),
    ],
)
def test_a_mistake_is_a_sentence(source: str, words: str):
    with pytest.raises(SemkvError, match=words):
        rendered(source)


def test_the_process_outlives_a_mistake():
    template = ChatTemplate("{{ messages[0].content.missing.more if messages | length == 1 else 'fine' }}", {})
    for _ in range(2):
        with pytest.raises(SemkvError, match="UndefinedError"):
            template.render(TALK[:1], add_generation_prompt=True)
        assert template.render(TALK, add_generation_prompt=True) == "fine"
    template.close()


def test_a_template_writes_no_file(tmp_path: Path):
    source = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "touched") + "') }}"
    with pytest.raises(SemkvError):
        rendered(source)
    assert not list(tmp_path.iterdir())


def test_too_long_a_template_is_refused():
    with pytest.raises(SemkvError, match="too long"):
        ChatTemplate(" " * (1 << 20) + "x", {})


def test_named_templates():
    tokenizer: Any = byte_tokenizer(CHATML.template)
    tokenizer.chat_template = {"tool_use": "tools", "default": "plain"}
    template = ChatTemplate.of(tokenizer)
    assert template is not None and template.render(TALK, add_generation_prompt=True) == "plain"
    tokenizer.chat_template = None
    assert ChatTemplate.of(tokenizer) is None


@pytest.mark.parametrize("form", [CHATML, FORMS["llama3"]])
def test_is_found_in_a_folder(form: Form, tmp_path: Path):
    byte_tokenizer(form.template, form.special).save_pretrained(tmp_path)
    template = ChatTemplate.in_folder(tmp_path)
    assert template is not None
    assert form.end in template.render(TALK, add_generation_prompt=True)
    template.close()


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"[]", json.dumps({"chat_template": 3}).encode()])
def test_a_folder_without_a_template(content: bytes, tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert ChatTemplate.in_folder(tmp_path) is None

"""Data makers: what examples hold, and what answers are worth. Each task's folder has its README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import semkv_deploy
from semkv_deploy.compiler.calibrate import calibration_text
from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.tasks import TASKS
from semkv_deploy.evaluate.tasks.base import Example, Setting
from semkv_deploy.evaluate.tasks.longbench import f1
from semkv_deploy.evaluate.texts import conversation, load_corpora, load_records
from tests.tiny import tiny_tokenizer

CONTEXT = 600


@pytest.fixture(scope="module")
def setting() -> Setting:
    tokenizer = tiny_tokenizer()
    text = tokenizer.encode(calibration_text() * 4, add_special_tokens=False)
    records = [{"context": "word " * 900, "input": f"which {n}?", "answers": ["word"]} for n in range(6)]
    texts = dict.fromkeys(("prose", "code", "chat"), text)
    return Setting(context=CONTEXT, count=4, seed=0, texts=texts, tokenizer=tokenizer, records={"longbench": records})


class Oracle:
    """Knows the answers: forced tokens get the largest logits, generated text is what is expected."""

    backend = "none"

    def __init__(self, says: Sequence[int]) -> None:
        self.says = list(says)

    def follow(self, ids: Sequence[int]) -> Any:
        return np.eye(600, dtype=np.float32)[[*list(ids)[1:], self.says[-1] if self.says else 0]]

    def generate(self, ids: Sequence[int], count: int, *, stop: bool = True) -> list[int]:
        return self.says


@pytest.mark.parametrize("name", TASKS)
def test_examples_fit_the_context_and_are_the_same_again(name: str, setting: Setting):
    examples = TASKS[name].examples(setting)
    assert len(examples) == 4 and examples == TASKS[name].examples(setting)
    assert len({example.turns for example in examples}) > 1 or name == "longbench"
    for example in examples:
        assert 0 < example.tokens <= CONTEXT and all(example.turns) and example.asks
        assert all(ask.prompt and (ask.answer or ask.texts or name == "agreement") for ask in example.asks)
        assert all(max(len(ask.prompt), len(ask.answer)) <= TASKS[name].extra for ask in example.asks)


def test_another_seed_gives_other_examples(setting: Setting):
    from dataclasses import replace

    for name in ("prose", "passkey", "facts", "ruler-multikey", "chat-recall"):
        assert TASKS[name].examples(setting) != TASKS[name].examples(replace(setting, seed=1))


def text_of(example: Example, setting: Setting) -> str:
    return str(setting.tokenizer.decode([token for turn in example.turns for token in turn]))


@pytest.mark.parametrize("name", ["passkey", "facts"])
def test_answers_are_in_the_context_and_the_prompt_leads_to_them(name: str, setting: Setting):
    for example in TASKS[name].examples(setting):
        text = text_of(example, setting)
        for ask in example.asks:
            prompt, answer = (setting.tokenizer.decode(list(ids)) for ids in (ask.prompt, ask.answer))
            assert f"{prompt.strip().splitlines()[-1].split('? ')[-1]}{answer}" in text


@pytest.mark.parametrize("name", ["ruler-single", "ruler-multikey", "ruler-variables", "chat-recall"])
def test_expected_texts_are_in_the_context(name: str, setting: Setting):
    for example in TASKS[name].examples(setting):
        text = text_of(example, setting)
        assert all(expected in text for ask in example.asks for expected in ask.texts)


def test_variables_hand_the_asked_value_along(setting: Setting):
    import re

    (example, *_) = TASKS["ruler-variables"].examples(setting)
    given = dict(re.findall(r"VAR (V\w+) = (?:VAR )?(\w+)\.", text_of(example, setting)))
    question = setting.tokenizer.decode(list(example.asks[0].prompt))
    (value,) = re.findall(r"the value (\d{5})", question)

    def resolved(name: str) -> str:
        return resolved(given[name]) if name in given else name

    assert {name for name in given if resolved(name) == value} == set(example.asks[0].texts)


def test_recall_is_of_whole_answers(setting: Setting):
    task = TASKS["passkey"]
    (example, *_) = task.examples(setting)
    answer = list(example.asks[0].answer)
    assert task.measure(example, Oracle(answer), str, None) == {"recall": 1}  # type: ignore[arg-type]
    wrong = Oracle([*answer[:-1], answer[-1] + 1])
    assert task.measure(example, wrong, str, None) == {"recall": 0}  # type: ignore[arg-type]


def test_generated_answers_are_matched(setting: Setting):
    task = TASKS["ruler-variables"]
    (example, *_) = task.examples(setting)
    names = example.asks[0].texts
    decode = setting.tokenizer.decode

    def score(text: str) -> float:
        return task.measure(example, Oracle(setting.encode(text)), decode, None)["match"]  # type: ignore[arg-type]

    assert score(" and ".join(names)) == 1 and score(names[0]) == 1 / 5 and score("nothing") == 0
    assert f1("The amber room", "amber room.") == 1 and f1("room", "amber room") == pytest.approx(2 / 3)
    assert f1("", "amber") == 0


def test_texts_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setenv("SEMKV_DEPLOY_CACHE", str(tmp_path))
    with pytest.raises(SemkvError, match=r"text prose: no such file.*fetch.py prose"):
        load_corpora(["prose"], {}, tokenizer)
    with pytest.raises(SemkvError, match=r"no data for the task.*--text longbench=FILE"):
        load_records(["longbench"], {})
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}')
    with pytest.raises(SemkvError, match="line 1: no dialogue"):
        load_corpora(["chat"], {"chat": tmp_path / "bad.jsonl"}, tokenizer)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SemkvError, match="cannot be read as UTF-8"):
        load_corpora(["prose"], {"prose": tmp_path / "bad.txt"}, tokenizer)


def test_dialogues_are_one_conversation_in_the_chat_template():
    line = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    tokenizer = tiny_tokenizer()
    text = conversation(f"{line}\n{line}\n", tokenizer, "here")
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n" * 2
    tokenizer.chat_template = None
    assert conversation(line, tokenizer, "here") == "User: Hi\nAssistant: Hello"


def test_every_task_has_a_folder_with_a_readme_that_names_it():
    folder = Path(semkv_deploy.__file__).parent / "evaluate" / "tasks"
    for name, task in TASKS.items():
        readme = folder / type(task).__module__.rsplit(".", 1)[1] / "README.md"
        text = readme.read_text(encoding="utf-8")
        assert name in text.splitlines()[0] and f"`{task.metric}`" in text, name

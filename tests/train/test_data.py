"""Dialogues: of documents that are trained on or held out, always the same; and what is wrong with files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.tasks import facts
from semkv_deploy.train import recall
from semkv_deploy.train.data import SINKS, Dialogues, documents
from semkv_deploy.train.layout import Dialogue
from semkv_deploy.train.recipe import Data
from tests.train.conftest import SMALL

ALL = [{"name": "austen"}, {"name": "recall"}, {"name": "echo"}]


def made(tokenizer: Any, *sources: dict[str, Any], seed: int = 0, **changes: Any) -> Dialogues:
    data = Data.model_validate({**SMALL["data"], "sources": list(sources or ALL), **changes})
    return Dialogues(data, tokenizer, seed=seed)


def chat(turns: int, words: str = "good morning to you") -> dict[str, Any]:
    roles = [{"from": role, "value": f"{words} {turn}"} for turn in range(turns) for role in ("human", "gpt")]
    return {"conversations": roles}


def write(path: Path, *records: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"name": "mine", "path": str(path)}


@pytest.mark.parametrize("source", ["austen", "recall", "echo"])
@pytest.mark.parametrize("part", ["train", "held-out"])
def test_dialogues_are_a_function_of_seed_part_and_number(source, part, tokenizer, cache):
    first, again, other = made(tokenizer), made(tokenizer), made(tokenizer, seed=1)
    drawn = [first.dialogue(part, number, source) for number in range(6)]
    assert drawn == [again.dialogue(part, number, source) for number in reversed(range(6))][::-1]
    assert len(set(drawn)) == 6 and drawn[0] != other.dialogue(part, 0, source)
    for dialogue in drawn:
        assert len(dialogue.turns) >= 2 and len(dialogue.pinned) == SINKS and dialogue.source == source


def test_documents_are_trained_on_or_held_out(tokenizer, cache):
    dialogues = made(tokenizer)
    parts = {part: {tokenizer.decode(each)[:12] for each in dialogues._texts["austen", part]}
             for part in ("train", "held-out")}  # fmt: skip
    assert len(parts["train"]) == 9 and len(parts["held-out"]) == 3 and not parts["train"] & parts["held-out"]
    texts = {part: [tokenizer.decode(ids) for ids in dialogues._texts["austen", part]] for part in parts}
    for part, of in texts.items():
        dialogue = dialogues.dialogue(part, 3, "austen")
        text = tokenizer.decode([*dialogue.pinned, *(token for turn in dialogue.turns for token in turn)])
        assert any(text in each for each in of)


def test_common_tokens_are_those_of_what_is_trained_on(tokenizer, cache):
    dialogues = made(tokenizer)
    seen = Counter(token for document in dialogues._texts["austen", "train"] for token in document)
    common = dialogues.common(9)
    assert [seen[token] for token in common] == sorted(seen.values(), reverse=True)[:9]
    assert len(set(common)) == 9 and common == made(tokenizer, seed=1).common(9)
    assert set(dialogues.common(10_000)) == set(seen)
    rank = dialogues.rank(3)
    assert {token: place for place, token in enumerate(common[:3])} == rank and not dialogues.rank(0)


def test_a_text_without_chapters_is_cut_into_blocks():
    assert documents("x" * 45_000) == ["x" * 20_000, "x" * 20_000, "x" * 5_000]
    assert len(documents("\n".join(f"Chapter {number}\nwords" for number in range(9)))) == 9


def test_answers_are_told_in_an_earlier_turn_and_nowhere_between(tokenizer, cache):
    dialogues, asked = made(tokenizer), 0
    for number in range(20):
        dialogue = dialogues.dialogue("train", number, "recall")
        texts = [tokenizer.decode(turn) for turn in dialogue.turns]
        for turn, start, end in dialogue.answers:
            asked += 1
            answer = tokenizer.decode(dialogue.turns[turn][start:end])
            sentence = tokenizer.decode(dialogue.turns[turn][:start]).rsplit("\n", 1)[1]
            assert any(f"\n{sentence}{answer}.\n" in text for text in texts[:turn]), (sentence, answer)
            assert texts[turn].count(f"{sentence}{answer}") == 1
    assert asked > 20


def test_what_evaluate_asks_is_never_trained_on():
    assert not set(facts.NAMES) & set(recall.NAMES)
    assert facts.SENTENCE not in {*recall.CODES, *recall.WORDS}
    for items in (recall.NAMES, recall.CODES, tuple(recall.WORDS)):
        train, held_out = recall._of(items, "train"), recall._of(items, "held-out")
        assert set(train) | set(held_out) == set(items) and not set(train) & set(held_out)


def test_an_echo_says_an_earlier_turn_again(tokenizer, cache):
    dialogues = made(tokenizer)
    for number in range(8):
        *earlier, last = dialogues.dialogue("train", number, "echo").turns
        text = tokenizer.decode(last)[1:]
        assert any(tokenizer.decode(turn).startswith(text) for turn in earlier)


@pytest.mark.parametrize(
    "record",
    [
        chat(3),
        {"messages": [{"role": role, "content": f"good day {n}"} for n in range(3) for role in ("user", "assistant")]},
        {"task": "CM", "id": 1, "history": [{"user": f"good day {n}", "bot": f"and to you {n}"} for n in range(3)]},
        {"turns": ["good day 0", "good day 1", "good day 2"], "reference": ["well", "well"]},
    ],
    ids=["sharegpt", "messages", "mt-bench-101", "mt-bench"],
)
def test_forms_of_dialogues(record: dict[str, Any], tokenizer: Any, tmp_path: Path):
    dialogues = made(tokenizer, write(tmp_path / "a.jsonl", *[record] * 8), tokens=400)
    dialogue = dialogues.dialogue("train", 0)
    texts = [tokenizer.decode(turn, skip_special_tokens=False) for turn in dialogue.turns]
    assert len(texts) == 3 and dialogue.pinned == () and dialogue.source == "mine"
    # A reply ends a turn; the template's line feed after it begins the next, as in a running chat.
    assert texts[0].startswith("<|im_start|>user\ngood") and texts[0].endswith("<|im_end|>")
    assert all(text.startswith("\n<|im_start|>user\ngood") for text in texts[1:])


def test_a_system_prompt_is_pinned(tokenizer, tmp_path):
    record = chat(2)
    record["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    dialogue = made(tokenizer, write(tmp_path / "a.jsonl", *[record] * 8), tokens=400).dialogue("train", 0)
    assert tokenizer.decode(dialogue.pinned) == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert tokenizer.decode(dialogue.turns[0]).startswith("<|im_start|>user\ngood")


def test_turns_that_do_not_fit_are_left_out(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", *[chat(9)] * 8)
    dialogue: Dialogue = made(tokenizer, source, tokens=120).dialogue("train", 0)
    assert 2 <= len(dialogue.turns) < 9 and dialogue.tokens <= 120


def test_data_without_a_multi_turn_example(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", *[chat(1)] * 20)
    sentence = r"mine \(a.jsonl\): training data with no multi-turn example in its train part .got 0 dialogues of two"
    with pytest.raises(SemkvError, match=sentence):
        made(tokenizer, source)
    with pytest.raises(SemkvError, match="no multi-turn example"):
        made(tokenizer, write(tmp_path / "a.jsonl", *[chat(3)] * 20), tokens=16)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('{"conversations": [{"from": "human", "value": 3}]}', r"mine \(a.jsonl\), line 1: no dialogue"),
        ('{"conversations": [{"from": "narrator", "value": "x"}]}', "no dialogue .*KeyError"),
        ('{"messages": [{"role": "user"}]}', "no dialogue"),
        ("\n\n{oops", "line 1: no dialogue"),
        ('["x"]', "no dialogue"),
    ],
)
def test_lines_that_are_no_dialogue(lines: str, sentence: str, tokenizer: Any, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(SemkvError, match=sentence):
        made(tokenizer, {"name": "mine", "path": str(tmp_path / "a.jsonl")})


def test_files_that_are_not_there(tokenizer, cache):
    with pytest.raises(SemkvError, match=r"chat .chat.jsonl.: no such file. Fetch it: python scripts/fetch.py chat"):
        made(tokenizer, {"name": "chat"})
    with pytest.raises(SemkvError, match=r"mine .gone.jsonl.: no such file\.$"):
        made(tokenizer, {"name": "mine", "path": "gone.jsonl"})
    with pytest.raises(SemkvError, match=r"unknown source .expected prose or .*got wiki"):
        made(tokenizer, {"name": "wiki"})
    with pytest.raises(SemkvError, match=r"no multi-turn example in its train part .got 9 documents, none of 9000"):
        made(tokenizer, {"name": "austen"}, tokens=9000)

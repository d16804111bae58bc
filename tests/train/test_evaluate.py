"""What evaluation measures, on a model whose answers are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from semkv_deploy.train import reference
from semkv_deploy.train.data import Dialogues
from semkv_deploy.train.evaluate import (
    DROPPED,
    FULL,
    HEAVY,
    OURS,
    STREAM,
    evaluate,
    full_logits,
    kept_logits,
    later_rows,
    measure,
    write,
)
from semkv_deploy.train.heavy_hitters import seen_by_heads
from semkv_deploy.train.layout import PINNED, Dialogue, batch_of, causal
from semkv_deploy.train.loop import make_objective, make_student
from semkv_deploy.train.objective import Look, attention_weights, contiguous, masked
from tests.train.conftest import Loaded, random_dialogue, small, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def objective(tokenizer: Any) -> Any:
    recipe = small()
    made = make_objective(recipe, make_student(recipe, Loaded(tiny_model(), tokenizer), CPU))
    with torch.no_grad():
        for parameter in made.student.lora_parameters("lora_b"):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return made


def test_a_window_over_everything_is_the_full_cache_and_none_is_dropped_history(objective):
    dialogue = Dialogue((5, 6, 7), ((8, 9, 10, 11), (12, 13, 14), (15, 16, 17)))
    for counts, twin in (([4, 3], FULL), ([1, 1], None)):
        batch = batch_of([dialogue], [counts])
        rows = later_rows(batch)
        assert rows.tolist() == [7, 8, 9, 10, 11]
        with torch.no_grad(), objective.student.attending():
            full, looks = full_logits(objective, batch, rows)
            logits = {**full, **kept_logits(objective, batch, rows, looks)}
            assert torch.equal(full["full"], objective.teacher_logits(batch, rows)[0])
        assert set(logits) == {FULL, OURS, STREAM, HEAVY, DROPPED}
        for name in (OURS, STREAM, HEAVY, DROPPED):
            same = torch.allclose(logits[name], logits[FULL], atol=1e-4)
            assert same == (name in (STREAM, HEAVY) and twin == FULL), (name, counts)


def test_h2o_keeps_the_newest_and_the_heaviest_of_each_head(objective):
    batch = batch_of([random_dialogue(3, (12, 9, 7))], [[5, 4]])
    looks: dict[int, Look] = {}
    with torch.no_grad(), objective.student.attending():
        objective.student.run(masked(causal(batch), looks), contiguous(batch), ids=batch.ids, head=None)
    turns = batch.turn[0].tolist()
    for look in looks.values():
        heads, rows = look.key.shape[1], len(turns)
        weights = attention_weights(look.query, look.key, causal(batch), look.scale)[0]
        seen = seen_by_heads(batch, look)[0]
        for head in range(heads):
            mass = weights.unflatten(0, (heads, -1))[head].sum(0).tolist()
            for query in range(rows):
                slots = {0: 0, 1: 5, 2: 9}.get(turns[query], 0)
                kept = reference.heavy_slots(turns, mass, turns[query], slots) if slots else set()
                own = {row for row in range(query + 1) if turns[row] in (PINNED, turns[query])}
                assert set(torch.nonzero(seen[head, query])[:, 0].tolist()) == own | kept, (head, query)


def test_recall_counts_answers_that_are_right_as_a_whole():
    dialogue = Dialogue((1,), ((2, 3, 4), (5, 6, 7, 8, 9)), answers=((1, 1, 3), (1, 4, 5)))
    batch = batch_of([dialogue], [[1]])
    rows = later_rows(batch)
    right = torch.nn.functional.one_hot(batch.target[0, rows], 12).float() * 9
    wrong = right.clone()
    wrong[1] = wrong[1].roll(1)  # the second token of the first answer
    found = measure({FULL: right, OURS: wrong}, batch, rows)
    assert found[FULL]["recall"] == 1 and found[OURS]["recall"] == 0.5
    assert found[FULL]["kl"] == pytest.approx(0, abs=1e-6) and found[OURS]["kl"] > 1 and found[OURS]["nll"] > 1


def test_a_table_has_every_task_share_and_way_with_intervals(objective, tokenizer, cache, tmp_path):
    recipe = small()
    dialogues = Dialogues(recipe.data, tokenizer, seed=0)
    table = evaluate(objective, dialogues, recipe, CPU, kept=[0.2, 0.5], examples=4)
    assert [(row["task"], row["kept"]) for row in table["rows"]] == [
        ("text", 0.2), ("text", 0.5), ("recall", 0.2), ("recall", 0.5),
    ]  # fmt: skip
    for row in table["rows"]:
        assert row["kept"] <= row["slots_per_token"] <= row["kept"] + 0.08
        for metrics in row["methods"].values():
            assert all(low <= mean <= high for mean, low, high in metrics.values())
            assert ("recall" in metrics) == (row["task"] == "recall")
        ours, stream = (row["methods"][name]["kl"][0] for name in (OURS, STREAM))
        assert row["nexus_minus"][STREAM]["kl"][0] == pytest.approx(ours - stream, abs=2e-4)
        assert row["methods"][FULL]["kl"][0] == 0 < ours
    write(table, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == table
    assert (tmp_path / "evaluation.md").read_text().count("\n| ") == 2 + 4 * 5 - 1

"""Passes through a model: gates, slots that are a prefix, bodies that have gone, and what losses look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.sonic_adapter import load_adapter, save_adapter
from semkv_deploy.train.layout import PINNED, batch_of, causal, sight
from semkv_deploy.train.objective import Look, Objective, attend_to, contiguous, masked, repeat_shift, repeat_sight
from semkv_deploy.train.recipe import AdapterShape, LossWeights
from semkv_deploy.train.student import GatedLinear, Student
from tests.train.conftest import random_dialogue, tiny_model

COUNTS = [4, 3]


@pytest.fixture
def objective(student: Any) -> Objective:
    return Objective(student, corner="causal", guided=[0, 1], answer_weight=4, floor=0.02)


def whole_logits(objective: Objective, counts: list[int] = COUNTS, **changes: Any) -> Any:
    batch = batch_of([random_dialogue(7)], [counts], objective.student.shape.placement)._replace(**changes)
    with torch.no_grad(), objective.student.attending():
        return batch, objective.student_logits(batch, torch.arange(batch.ids.shape[1]))


def test_without_nexus_rows_the_model_is_the_base_to_the_last_bit(student):
    batch = batch_of([random_dialogue(7)], [COUNTS])
    base = tiny_model()
    expected = base(input_ids=batch.ids).logits
    assert torch.equal(student.model(input_ids=batch.ids).logits, expected)
    student.close()
    assert not any(isinstance(module, GatedLinear) for module in student.model.modules())
    assert torch.equal(student.model(input_ids=batch.ids).logits, expected)


def test_rows_that_see_no_nexus_row_are_the_base_model_to_the_last_bit(objective):
    batch, logits = whole_logits(objective)
    closed = objective.student
    for gated in closed._linears.values():
        torch.nn.init.zeros_(gated.lora_b)
    _, without = whole_logits(objective)
    first = (batch.turn[0] == PINNED) | (batch.turn[0] == 0)
    assert torch.equal(logits[0, first], without[0, first])
    assert not torch.allclose(logits[0, ~first], without[0, ~first], atol=1e-3)


def test_a_gated_module_leaves_rows_before_the_gate_alone(student):
    gated = student._linears[0, "q_proj"]
    rows = torch.randn(2, 9, 32)
    expected = gated.base(rows)
    student.gate.first = 5
    changed = gated(rows)
    assert torch.equal(changed[:, :5], expected[:, :5])
    delta = rows[:, 5:] @ gated.lora_a.T @ gated.lora_b.T
    assert torch.allclose(changed[:, 5:], expected[:, 5:] + delta, atol=1e-5) and delta.abs().max() > 0.1
    student.gate.first = 9
    assert torch.equal(gated(rows), expected)


def deleted_logits(student: Student, counts: list[int]) -> torch.Tensor:
    """Logits of the open turn as a deployment has them: bodies leave the cache, row by row run in pieces."""
    batch = batch_of([random_dialogue(7)], [counts], student.shape.placement)
    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(rows: dict[str, Any], position: torch.Tensor, kept: int | None) -> torch.Tensor:
        """Appends rows, causally; then cuts what `kept` rows before the appended ones do not hold."""

        def attend(layer: int, spec: Any, query: Any, key: Any, value: Any) -> Any:
            if layer in cache:
                key, value = (torch.cat((old, new), 2) for old, new in zip(cache[layer], (key, value), strict=True))
            cache[layer] = key, value
            total, new = key.shape[2], query.shape[2]
            seen = torch.arange(total)[None] <= torch.arange(total - new, total)[:, None]
            return attend_to(query, key, value, seen[None], spec.scale)

        result = student.run(attend, position, **rows)
        if kept is not None:
            new = position.shape[1]
            for layer, (key, value) in cache.items():
                cache[layer] = tuple(torch.cat((x[:, :, :kept], x[:, :, -new:]), 2) for x in (key, value))  # type: ignore[assignment]
        return result

    with torch.no_grad(), student.attending():
        text = lambda turn: (batch.turn == turn)[0]  # noqa: E731
        live = int(text(PINNED).sum())
        run({"ids": batch.ids[:, text(PINNED)]}, batch.position[:, text(PINNED)], None)
        for turn, count in enumerate(counts):
            run({"ids": batch.ids[:, text(turn)]}, batch.position[:, text(turn)], None)
            own = (batch.nexus_turn == turn)[0]
            nexus = student.embed_nexus(*(of[:, own] for of in (batch.nexus_turn, batch.nexus_slot, batch.nexus_token)))
            run({"nexus": nexus, "head": None}, batch.nexus_position[:, own], live)
            live += count
            assert cache[0][0].shape[2] == live
        last = text(len(counts))
        return run({"ids": batch.ids[:, last]}, batch.position[:, last], None)


@pytest.mark.parametrize("counts", [[4, 3], [1, 6]])
def test_bodies_that_are_masked_and_bodies_that_have_gone_give_the_same_logits(objective, counts):
    batch, logits = whole_logits(objective, counts)
    gone = deleted_logits(objective.student, counts)
    assert (logits[0, batch.turn[0] == 2] - gone[0]).abs().max() < 1e-4


def test_fewer_slots_are_a_prefix_of_more(student):
    """Keys and values of a turn's first K rows do not know how many follow."""

    def rows(count: int) -> list[torch.Tensor]:
        batch = batch_of([random_dialogue(7, (9, 7))], [[count]], student.shape.placement)
        looks: dict[int, Look] = {}
        nexus = student.embed_nexus(batch.nexus_turn, batch.nexus_slot, batch.nexus_token)
        with torch.no_grad(), student.attending():
            position = torch.cat((batch.position, batch.nexus_position), 1)
            student.run(masked(sight(batch).whole, looks), position, ids=batch.ids, nexus=nexus)
        return [getattr(looks[layer], name)[0, :, 19:] for layer in (0, 1) for name in ("key", "value")]

    for few, many in zip(rows(2), rows(6), strict=True):
        assert few.shape[1] == 2 and torch.allclose(few, many[:, :2], atol=1e-6)


def test_a_batch_is_its_dialogues_one_by_one(objective):
    dialogues, counts = [random_dialogue(1, (5, 4)), random_dialogue(2, (9, 6, 7), pinned=2)], [[2], [4, 1]]
    weights = LossWeights(kd=1, ce=1, attn=1, reg=1)
    placement = objective.student.shape.placement
    both = batch_of(dialogues, counts, placement)
    alone = [batch_of([dialogue], [of], placement) for dialogue, of in zip(dialogues, counts, strict=True)]
    with torch.no_grad():
        sizes = [objective.row_weights(batch).sum() for batch in alone]
        parts = [objective(batch, weights) for batch in alone]
        for name in ("kd", "ce"):
            expected = sum(size * part[name] for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
            assert torch.allclose(objective(both, weights)[name], expected, rtol=1e-4)


def test_losses_have_gradients_where_they_should_and_nowhere_else(objective):
    placement = objective.student.shape.placement
    batch = batch_of([random_dialogue(1), random_dialogue(2)], [COUNTS, [2, 2]], placement)
    for name in LossWeights.model_fields:
        other = {"kd": 1e-9} if name == "rec" else {}
        weights = LossWeights.model_validate({name: 1, **other})
        objective.zero_grad()
        found = objective(batch, weights)
        assert set(found) == {name, "total", *other} and torch.isfinite(found["total"])
        found["total"].backward()
        trained = [*objective.student.embedding_parameters(), *objective.student.lora_parameters("lora_b")]
        # What the floor asks for is there already in a random model, so its hinge is flat.
        assert name == "reg" or all(p.grad is not None and p.grad.abs().max() > 0 for p in trained[:4])
        assert all(p.grad is None for p in objective.student.model.parameters() if not p.requires_grad)


def test_the_teacher_is_the_base_model_with_a_full_cache(objective):
    batch = batch_of([random_dialogue(1)], [COUNTS])
    with torch.no_grad(), objective.student.attending():
        teacher = objective.teacher_logits(batch, torch.arange(batch.ids.shape[1]))
    assert torch.allclose(teacher, tiny_model()(input_ids=batch.ids).logits, atol=1e-4)


def test_match_is_zero_where_nexus_rows_hold_what_the_bodies_did(objective, monkeypatch):
    """Queries that see the bodies as well as the Nexus rows' place: nothing is missing, so nothing is wrong."""
    import semkv_deploy.train.objective as module

    batch = batch_of([random_dialogue(1)], [COUNTS], objective.student.shape.placement)
    assert objective(batch, LossWeights(match=1))["match"] > 0.01
    full = sight(batch)._replace(text_text=causal(batch), text_nexus=torch.zeros_like(sight(batch).text_nexus))
    monkeypatch.setattr(module, "sight", lambda *_: full)
    assert objective(batch, LossWeights(match=1))["match"] < 1e-9


def test_reconstruction_sees_a_turns_own_nexus_rows_and_nothing_of_others():
    batch = batch_of([random_dialogue(1, (4, 3, 5), pinned=2)], [[2, 3]])
    seen = repeat_sight(batch)[0]
    assert seen[2].tolist() == [True] * 3 + [False] * 11 + [True] * 2 + [False] * 3
    assert not seen[9:, 14:].any()
    # A finished body is read again right behind its Nexus rows: as many positions on as body and rows are long.
    assert repeat_shift(batch)[0].tolist() == [0, 0, 6, 6, 6, 6, 6, 6, 6, 0, 0, 0, 0, 0]
    spread = batch_of([random_dialogue(1, (4, 3, 5), pinned=2)], [[2, 3]], "spread")
    assert repeat_shift(spread)[0].tolist() == [0, 0, 4, 4, 4, 4, 3, 3, 3, 0, 0, 0, 0, 0]
    assert contiguous(batch)[0].tolist() == list(range(14))


def test_an_adapter_is_what_was_trained_and_training_goes_on_from_it(student, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, student.export({"steps": 3}, "causal"))
    adapter = load_adapter(path)
    assert adapter.placement == student.shape.placement
    none = torch.tensor([[-1, -1]])
    rows = student.embed_nexus(torch.tensor([[7, 7]]), torch.tensor([[0, 1]]), none).detach().numpy()[0]
    assert np.array_equal(adapter.rows(7, 2), rows)
    assert len(adapter.modules) == 10 and adapter.rank == 4
    other = Student(tiny_model(), student.shape, separator=9, seed=5)
    other.take(adapter)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), student.parameters(), strict=True))
    shape = student.shape.model_copy(update={"k_max": 4, "modules": ("q_proj",)})
    smaller = Student(tiny_model(), shape, None)
    with pytest.raises(SemkvError, match="the adapter has another shape than the recipe's"):
        smaller.take(adapter)
    elsewhere = {"appended": "spread", "spread": "appended"}[adapter.placement]
    with pytest.raises(SemkvError, match=f"stand elsewhere.*Set adapter.placement to {adapter.placement}"):
        Student(tiny_model(), student.shape.model_copy(update={"placement": elsewhere}), None).take(adapter)


def test_rows_start_from_a_separator_or_from_the_mean_and_spread_ones_from_their_tokens():
    table = tiny_model().get_input_embeddings().weight
    spread = Student(tiny_model(), AdapterShape(k_max=4, modules=(), placement="spread"), 5)
    index = torch.tensor([[0, 1]])
    assert torch.equal(spread.embed_nexus(index, index, torch.tensor([[7, 9]]))[0], table[[7, 9]])
    for separator, expected in ((5, table[5]), (None, table.mean(0))):
        made = Student(tiny_model(), AdapterShape(k_max=4, noise=0, modules=(), placement="appended"), separator)
        assert torch.allclose(made.nexus, expected.expand(4, -1)) and not made.turn.any()
        assert made.export({}, "causal").rank == 0


def test_a_module_that_the_model_has_not_is_named():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2)  # fmt: skip
    with pytest.raises(SemkvError, match=r"adapter.modules: q_proj, layer 0: the model has no such linear module"):
        Student(GPTNeoXForCausalLM(config).eval(), AdapterShape(), None)

"""Runs: one that is resumed is one that was not interrupted, losses fall, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.sonic_adapter import load_adapter
from semkv_deploy.train.batches import Batches
from semkv_deploy.train.data import Dialogues
from semkv_deploy.train.layout import batch_of
from semkv_deploy.train.loop import BEST, LOG, STATE, Training
from semkv_deploy.train.objective import Objective
from semkv_deploy.train.recipe import LossWeights
from tests.train.conftest import Loaded, random_dialogue, small, tiny_model


def started(out: Path, tokenizer: Any, *, resume: bool = False, **changes: Any) -> Training:
    return Training(small(**changes), Loaded(tiny_model(), tokenizer), out, resume=resume, report=lambda *_: None)


def steps_of(out: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, (out / LOG).read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in entry.items() if k not in ("seconds", "took")} for entry in entries if "stage" in entry]


def test_a_resumed_run_is_one_that_was_not_interrupted(tokenizer, cache, tmp_path):
    whole = started(tmp_path / "whole", tokenizer)
    assert whole.run()
    parts = tmp_path / "parts"
    assert not started(parts, tokenizer).run(minutes=0)  # leaves after one step
    assert not started(parts, tokenizer, resume=True).run(minutes=0)
    # What a killed process logged after its last checkpoint is taken again.
    (parts / LOG).write_text((parts / LOG).read_text() + '{"step": 3, "stage": "lost"}\n')
    last = started(parts, tokenizer, resume=True)
    assert last.step == 2 and last.run()
    assert steps_of(parts) == steps_of(tmp_path / "whole") and len(steps_of(parts)) == 5
    for mine, other in zip(whole._trained(), last._trained(), strict=True):
        assert torch.equal(mine, other)
    assert whole.tokens == last.tokens > 5 * 2 * 30


def test_a_run_leaves_its_best_adapter_and_no_half_files(tokenizer, cache, tmp_path):
    training = started(tmp_path / "run", tokenizer)
    training.run()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [BEST, STATE, LOG]
    adapter = load_adapter(tmp_path / "run" / BEST)
    entries = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    measured = {entry["step"]: sum(entry["held_out"].values()) / 2 for entry in entries if "held_out" in entry}
    assert list(measured) == [2, 4, 5] and set(entries[2]["held_out"]) == {"0.2", "0.5"}
    assert adapter.trained["held_out_kl"] == min(measured.values()) == measured[adapter.trained["steps"]]


def test_stages_are_fitted_to_a_time(tokenizer, cache, tmp_path):
    training = started(tmp_path / "run", tokenizer)
    before = [parameter.detach().clone() for parameter in training._trained()]
    planned = [stage.steps for stage in training.recipe.stages]
    training.fit(0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, training._trained(), strict=True))
    factors = [stage.steps / of for stage, of in zip(training.recipe.stages, planned, strict=True)]
    assert max(factors) > 1 and max(factors) / min(factors) < 1.5
    assert training.run(minutes=2)
    seconds = json.loads((tmp_path / "run" / LOG).read_text().splitlines()[-2])["seconds"]
    assert 2 < seconds < 60, (planned, factors)
    with pytest.raises(SemkvError, match="a run that has begun keeps its stages"):
        training.fit(0.2)


def test_batches_made_by_other_processes_are_those_made_here(tokenizer, cache):
    recipe = small()
    batches = Batches(Dialogues(recipe.data, tokenizer, seed=recipe.seed), recipe)
    made = list(batches.made(0, 4, workers=2))
    assert len(made) == 4
    for number, batch in enumerate(made):
        for mine, other in zip(batches[number], batch, strict=True):
            assert torch.equal(mine, other)


def test_stages_train_what_they_say(tokenizer, cache, tmp_path):
    training = started(tmp_path / "run", tokenizer)
    before = [parameter.detach().clone() for parameter in training._trained()]
    batches = training._batches.loaded(0, 3, torch.device("cpu"))
    for _ in range(2):
        training._step(batches)
    nexus, turn, *lora = (not torch.equal(a, b) for a, b in zip(before, training._trained(), strict=True))
    assert nexus and turn and not any(lora)
    training._step(batches)
    moved = {key for key, gated in training.student._linears.items() if gated.lora_b.any()}
    # Nothing comes of what the last layer's Nexus rows attend to: only their keys and values are seen.
    assert set(training.student._linears) - moved == {(1, "q_proj"), (1, "o_proj")}


@pytest.mark.parametrize("loss", ["kd", "match", "rec"])
def test_losses_fall_on_a_toy_task(loss, student):
    """The same dialogues again and again: 25 steps take off a good part of each loss."""
    objective = Objective(student, corner="causal", guided=[1], answer_weight=1, floor=0.02)
    batch = batch_of([random_dialogue(n, (10, 8, 8)) for n in range(2)], [[5, 4], [5, 4]], student.shape.placement)
    weights = LossWeights.model_validate({loss: 1, **({"match": 0.001} if loss == "rec" else {})})
    parameters = [
        *student.embedding_parameters(),
        *student.lora_parameters("lora_a"),
        *student.lora_parameters("lora_b"),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    values = []
    for _ in range(25):
        losses = objective(batch, weights)
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(losses[loss].item())
    assert values[-1] < 0.8 * values[0], values


def test_a_folder_with_a_run_is_not_overwritten_and_one_without_is_not_resumed(tokenizer, cache, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SemkvError, match=r"there is no run to go on with. Leave --resume out"):
        started(out, tokenizer, resume=True)
    started(out, tokenizer).run(minutes=0)
    with pytest.raises(SemkvError, match=r"the folder has a run. Go on with --resume"):
        started(out, tokenizer)
    with pytest.raises(SemkvError, match="the run was started with another recipe"):
        started(out, tokenizer, resume=True, kept=[0.3, 0.4])
    longer = [{**small().stages[0].model_dump(), "steps": 1}]
    assert started(out, tokenizer, resume=True, stages=longer).step == 1
    (out / STATE).write_bytes((out / STATE).read_bytes()[:-999])
    with pytest.raises(SemkvError, match="the checkpoint is damaged"):
        started(out, tokenizer, resume=True)
    torch.save({"x": 1}, out / STATE)
    with pytest.raises(SemkvError, match="not a checkpoint of `semkv-deploy train`"):
        started(out, tokenizer, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(tokenizer, cache, tmp_path):
    training = started(tmp_path / "run", tokenizer)
    with torch.no_grad():
        training.student.nexus.fill_(torch.inf)
    with pytest.raises(SemkvError, match=r"step 0, stage embeddings: the loss is not finite .got nan"):
        training.run()
    assert not (tmp_path / "run" / STATE).exists()

"""The training run: steps, checkpoints, a log; on whatever accelerate finds, one process or many."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.sonic_adapter import save_adapter
from semkv_deploy.train.batches import Batches
from semkv_deploy.train.data import Dialogues
from semkv_deploy.train.objective import Objective
from semkv_deploy.train.schedule import rates
from semkv_deploy.train.student import Student

if TYPE_CHECKING:
    from torch import Tensor

    from semkv_deploy.train.layout import Batch
    from semkv_deploy.train.recipe import Recipe, Stage

STATE, BEST, LOG = "checkpoint.pt", "best.safetensors", "log.jsonl"
"""In the output folder: where a run goes on, its best adapter so far, and a JSON object a line for each step."""

WARM, TIMED = 3, 5
"""Steps before `fit` takes the time, and those that it times."""

Report = Callable[[str, float | None], None]


class Training:
    """A run in an output folder.

    Accelerate's own `save_state` would write the frozen model with every checkpoint; ours holds what is trained.

    Args:
        checkpoint: model and tokenizer, as `load_checkpoint` gives them.
        resume: whether the folder has a run of the same recipe that goes on.
    """

    def __init__(self, recipe: Recipe, checkpoint: Any, out: Path, *, resume: bool, report: Report) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        # A stage that trains embeddings alone, or a loss that takes other passes, leaves parameters out.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(kwargs_handlers=[unused])
        self.recipe, self.out = recipe, out
        self.report: Report = report if self.accelerator.is_main_process else lambda what, share: None
        self.dialogues = Dialogues(recipe.data, checkpoint.tokenizer, seed=recipe.seed)
        self._batches = Batches(self.dialogues, recipe, self.accelerator.process_index, self.accelerator.num_processes)
        self.student = make_student(
            recipe, checkpoint, self.accelerator.device, self.dialogues.common(recipe.adapter.common)
        )
        groups = [
            {"params": self.student.embedding_parameters(), "name": "embeddings"},
            {"params": self.student.lora_parameters("lora_a"), "name": "lora_a"},
            {"params": self.student.lora_parameters("lora_b"), "name": "lora_b"},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self.objective, self.optimizer = self.accelerator.prepare(make_objective(recipe, self.student), optimizer)
        self.step, self.tokens, self.seconds, self.best = 0, 0, 0.0, float("inf")
        if resume:
            self._restore()
        elif (out / STATE).exists():
            raise SemkvError("the folder has a run", where=out, fix="go on with --resume, or name another with -o")

    def run(self, *, minutes: float | None = None) -> bool:
        """Takes the steps that are left; returns whether all are taken.

        Args:
            minutes: after which the run is checkpointed and left.
        """
        start, before = time.monotonic(), self.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self._drop_later_lines()
        per_step = self.recipe.accumulate
        batches = self._batches.loaded(self.step * per_step, self.recipe.steps * per_step, self.accelerator.device)
        while self.step < self.recipe.steps:
            entry = self._step(batches)
            self.seconds = before + time.monotonic() - start
            self._log({**entry, "tokens": self.tokens, "seconds": round(self.seconds, 1)})
            done = self.step == self.recipe.steps
            late = minutes is not None and self._any(time.monotonic() - start > 60 * minutes)
            if done or late or self.step % self.recipe.checkpoint_every == 0:
                self._keep_best()
                self.save()
            if late and not done:
                return False
        return True

    def fit(self, minutes: float) -> None:
        """Makes all stages longer or shorter by one factor, so that they end in about `minutes`, this call included.

        A few steps of each are timed, without changing what is trained.

        Raises:
            SemkvError: when steps have been taken.
        """
        if self.step:
            raise SemkvError("a run that has begun keeps its stages", fix="leave out --fit, or --resume")
        start = time.monotonic()
        batches = list(self._batches.loaded(0, WARM + TIMED, self.accelerator.device))
        seconds = sum(stage.steps * self._seconds_of_step(stage, batches) for stage in self.recipe.stages)
        left = 60 * minutes - (time.monotonic() - start)
        self.recipe = self.recipe.scaled(max(left, 0) / seconds)

    def _seconds_of_step(self, stage: Stage, batches: Sequence[Batch]) -> float:
        """Of losses and gradients of a stage; what changes weights, checkpoints and reports is little beside them."""
        for number, batch in enumerate(batches):
            if number == WARM:
                self._finish_device()
                start = time.monotonic()
            self.accelerator.backward(self.objective(batch, stage.losses)["total"])
            self.optimizer.zero_grad(set_to_none=True)
        self._finish_device()
        return (time.monotonic() - start) / TIMED * self.recipe.accumulate

    def _finish_device(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def _any(self, here: bool) -> bool:
        """Whether it is so in any process: clocks differ, and all leave after the same step."""
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def export(self, path: Path) -> None:
        """Writes what is trained now as an adapter."""
        save_adapter(path, self.student.export(self.trained(), self.recipe.adapter.corner))

    def trained(self) -> dict[str, Any]:
        """What an adapter's file says of its training."""
        return {"recipe": self.recipe.name, "steps": self.step, "tokens": self.tokens, "held_out_kl": self.best}

    def _step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        stage, within = self.recipe.stage_at(self.step)
        lr = rates(stage, within)
        for group in self.optimizer.param_groups:
            group["lr"] = lr[group["name"]]
            for parameter in group["params"]:
                parameter.requires_grad_(lr[group["name"]] > 0)
        sums: dict[str, Tensor] = {}
        for micro in range(self.recipe.accumulate):
            batch = next(batches)
            last = micro == self.recipe.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                losses = self.objective(batch, stage.losses)
                self.accelerator.backward(losses["total"] / self.recipe.accumulate)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / self.recipe.accumulate
            self.tokens += batch.tokens * self.accelerator.num_processes
        if not torch.isfinite(sums["total"]):
            raise SemkvError(
                "the loss is not finite", where=f"step {self.step}, stage {stage.name}", got=float(sums["total"]),
                fix="lower the stage's learning rates; --resume goes on from the last checkpoint",
            )  # fmt: skip
        norm = self.accelerator.clip_grad_norm_(self._trained(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.report(f"training, stage {stage.name}", (within + 1) / stage.steps)
        means = {name: round(float(self.accelerator.reduce(loss, "mean")), 5) for name, loss in sums.items()}
        return {"step": self.step, "stage": stage.name, **means, "norm": round(float(norm), 4), "lr": lr["embeddings"]}

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _keep_best(self) -> None:
        """Measures KL on a few held-out dialogues; where it is the least so far, writes the adapter."""
        from semkv_deploy.train.evaluate import quick_kl

        started = time.monotonic()
        kl = quick_kl(self.objective_alone, self.dialogues, self.recipe, self.accelerator.device)
        mean = sum(kl.values()) / len(kl)
        self._log({"step": self.step, "held_out": kl, "took": round(time.monotonic() - started, 1)})
        if mean < self.best:
            self.best = mean
            if self.accelerator.is_main_process:
                self.export(self.out / BEST)

    @property
    def objective_alone(self) -> Objective:
        """The objective without what accelerate has wrapped around it."""
        found: Objective = self.accelerator.unwrap_model(self.objective)
        return found

    def _log(self, entry: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _identity(self) -> str:
        """What may not change while a run goes on: all but the model's place, and stages: a run can be prolonged."""
        return self.recipe.model_dump_json(exclude={"model", "stages", "checkpoint_every"})

    def save(self) -> None:
        """Writes the checkpoint beside the last one, then renames."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "recipe": self._identity(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "trained": [parameter.detach().cpu() for parameter in self._trained()],
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        beside = self.out / f"{STATE}.{os.getpid()}.part"
        try:
            torch.save(state, beside)
            beside.replace(self.out / STATE)
        finally:
            beside.unlink(missing_ok=True)

    def _restore(self) -> None:
        path = self.out / STATE
        state = read_state(path)
        if state["recipe"] != self._identity():
            raise SemkvError(
                "the run was started with another recipe", where=path,
                fix="give the recipe that it was started with, or another folder with -o",
            )  # fmt: skip
        with torch.no_grad():
            for parameter, value in zip(self._trained(), state["trained"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.best = state["seconds"], state["best"]

    def _drop_later_lines(self) -> None:
        """Steps after the checkpoint are taken again: their lines leave the log."""
        log = self.out / LOG
        if not self.accelerator.is_main_process or not log.is_file():
            return
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= self.step]
        log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint.

    Raises:
        SemkvError: when there is none, or it is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SemkvError("there is no run to go on with", where=path, fix="leave --resume out") from None
    except Exception as error:
        raise SemkvError("the checkpoint is damaged", where=path, got=f"{type(error).__name__}: {error}") from None
    if not isinstance(state, dict) or {"recipe", "step", "trained", "optimizer"} - state.keys():
        raise SemkvError("not a checkpoint of `semkv-deploy train`", where=path)
    return state


def make_student(recipe: Recipe, checkpoint: Any, device: torch.device, common: tuple[int, ...] = ()) -> Student:
    """The student on a device, its frozen weights as the recipe has them; what is trained is float32 everywhere."""
    precision = recipe.precision or ("bfloat16" if device.type == "cuda" else "float32")
    separator = None
    if recipe.adapter.start == "separator":
        separator = checkpoint.tokenizer.encode("\n", add_special_tokens=False)[-1]
    dtype = getattr(torch, precision)
    return Student(checkpoint.model, recipe.adapter, separator, recipe.seed, common, dtype).to(device)


def make_objective(recipe: Recipe, student: Student) -> Objective:
    """The losses with a recipe's settings."""
    return Objective(
        student,
        corner=recipe.adapter.corner,
        guided=[int(share * student.layers) for share in recipe.guided],
        answer_weight=recipe.answer_weight,
        floor=recipe.floor,
    )

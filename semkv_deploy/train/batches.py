"""A run's batches by number, made by other processes where the device would wait for them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from semkv_deploy.train.layout import Batch, batch_of, counts_for

if TYPE_CHECKING:
    import torch

    from semkv_deploy.train.data import Dialogues
    from semkv_deploy.train.recipe import Recipe

MOST_WORKERS = 8
"""A core makes a batch of 16 dialogues in some 40 ms, a GPU takes it in 100."""


class Batches(Dataset[Batch]):
    """Batch `number` of a process on the CPU, with the numbers of Nexus rows drawn: a function of seed and numbers.

    Args:
        process, processes: which of how many processes that share the run.
    """

    def __init__(self, dialogues: Dialogues, recipe: Recipe, process: int = 0, processes: int = 1) -> None:
        self._dialogues, self._recipe = dialogues, recipe
        self._process, self._processes = process, processes

    def __getitem__(self, number: int) -> Batch:
        recipe = self._recipe
        first = (number * self._processes + self._process) * recipe.batch
        numbers = range(first, first + recipe.batch)
        dialogues = [self._dialogues.dialogue("train", number) for number in numbers]
        shares = [random.Random(f"{recipe.seed} kept {number}").uniform(*recipe.kept) for number in numbers]
        return batch_of(dialogues, [
            counts_for([len(turn) for turn in dialogue.turns[:-1]], kept, recipe.adapter.k_max)
            for dialogue, kept in zip(dialogues, shares, strict=True)
        ], recipe.adapter.placement, self._dialogues.rank(recipe.adapter.common))  # fmt: skip

    def loaded(self, first: int, last: int, device: torch.device) -> Iterator[Batch]:
        """Batches `first` … `last - 1` in order. For a GPU other processes make them, a CPU has no core to spare."""
        workers = 0 if device.type == "cpu" else min(MOST_WORKERS, max(1, (os.cpu_count() or 2) - 1))
        for batch in self.made(first, last, workers):
            yield batch.to(device)

    def made(self, first: int, last: int, workers: int) -> Iterator[Batch]:
        """The same on the CPU, by so many other processes; 0: by this one."""
        loader: Any = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context="fork" if workers else None,  # texts are shared, not sent
            prefetch_factor=4 if workers else None,
        )
        return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch

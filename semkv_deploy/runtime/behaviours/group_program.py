"""What interpreters share that run a program on cache groups: it changes slots for good, and is counted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from semkv_deploy.runtime.behaviours.base import Interpreter

if TYPE_CHECKING:
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine, Feeds


class GroupProgramRunner(Interpreter):
    """Runs one program."""

    def __init__(self, program: str, engine: Engine, slots: Slots) -> None:
        super().__init__()
        self._program, self._engine, self._slots = program, engine, slots

    def _run(self, feeds: Mapping[int, Feeds]) -> None:
        """Runs the program for these groups, and takes over the lengths and slot columns that come out.

        Args:
            feeds: by group, inputs beside buffers, lengths and slot columns.
        """
        started = time.perf_counter()
        slots = self._slots
        self.changes, self.changing = self.changes + 1, True
        given = {
            group: {
                **own,
                **{name: column[group] for name, column in slots.columns.items()},
                "length": slots.length[group],
            }
            for group, own in feeds.items()
        }
        for group, outputs in self._engine.run_groups(self._program, given).items():
            slots.length[group] = outputs["length_out"]
            for name, column in slots.columns.items():
                column[group][:] = outputs[f"{name}_out"]
            self.stats.levels.update(outputs["level"].tolist())
            self.stats.evicted += int(outputs["evicted"].sum())
        self.changing = False
        self.stats.runs += 1
        self.stats.seconds += time.perf_counter() - started

"""What every engine does, so that the same things are timed of all of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from semkv_deploy.errors import SemkvError

Rows = Sequence[Sequence[int]]
"""Token ids of each batch row, equally many."""

WARM_UP = 8
"""Tokens of the prompt that are run, and forgotten, before anything is timed."""


class Engine(ABC):
    """One model with one kind of cache and a fixed number of rows.

    Attributes:
        memory_shows: whether memory that comes on top of the loaded weights can be sampled while the engine runs.
    """

    memory_shows = False

    @property
    def pid(self) -> int | None:
        """Of the process that has the model; None: this one."""
        return None

    @abstractmethod
    def reset(self) -> None:
        """Forgets the conversations of all rows."""

    @abstractmethod
    def prefill(self, rows: Rows) -> float:
        """Appends a turn's prompt to every row, behind the last token of the reply before, which was chosen and not yet
        appended, and chooses the first token of the reply.

        Returns:
            Seconds until every row has its token.
        """

    @abstractmethod
    def decode(self, count: int) -> float:
        """Takes `count` steps in every row, at least 2: appends the chosen token, chooses the next.

        Returns:
            Milliseconds of a step of all rows: the mean of all but the first, which finds the processor's caches with
            what another process left there.
        """

    def end_turn(self) -> float:
        """Does what is done between two turns.

        Returns:
            Seconds; engines that keep everything do nothing.
        """
        return 0.0

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What is known now, of these: `live_slots` (mean of rows and cache groups), `cache_mib` (allocated for the
        cache), `read_mib` (of it, read by one step), `compress_s` and others of compression."""

    def about(self) -> dict[str, str]:
        """What the runtime says of itself: versions, instruction sets."""
        return {}


class SteppingEngine(Engine):
    """An engine whose steps are calls from Python."""

    def prefill(self, rows: Rows) -> float:
        started = time.perf_counter()
        self._append(rows)
        return time.perf_counter() - started

    def decode(self, count: int) -> float:
        self._step()
        started = time.perf_counter()
        for _ in range(count - 1):
            self._step()
        return (time.perf_counter() - started) * 1e3 / (count - 1)

    @abstractmethod
    def _append(self, rows: Rows) -> None:
        """Appends ids to every row and chooses a token."""

    @abstractmethod
    def _step(self) -> None:
        """Appends the chosen tokens, chooses the next."""


def require_package(module: str, where: str) -> None:
    """Fails unless a peer's package is installed.

    Raises:
        SemkvError: with what to install.
    """
    if find_spec(module) is None:
        raise SemkvError(
            f"{module.replace('_', '-')} is not installed",
            where=where,
            fix="install it with: pip install 'semkv-deploy[bench]'",
        )


def require_vocabulary(has: int, needs: int, where: str) -> None:
    """Fails where a peer's model lacks tokens that the others read.

    Raises:
        SemkvError: it is of another model.
    """
    if has < needs:
        raise SemkvError(
            "has another vocabulary than the bundle", where=where, expected=f"{needs} entries or more", got=has,
            fix="give the model that the bundle was built from",
        )  # fmt: skip

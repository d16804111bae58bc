"""The turns of one HTTP call: what the scheduler's thread says of them, heard in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from semkv_deploy.serve.turn import Finished, Listener, Piece, Request, Turn

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

    from semkv_deploy.serve.scheduler import Scheduler

Event = tuple[int, "Piece | Finished"]


class Call:
    """Turns that are broken off when the client goes, or when the call is closed.

    Args:
        http: its body has been read.

    Attributes:
        gone: whether the client has gone.

    Raises:
        SemkvError: as `Scheduler.submit`.
    """

    def __init__(self, scheduler: Scheduler, http: HttpRequest, asked: Sequence[Request]) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._turns: list[Turn] = []
        self._left = len(asked)
        self.gone = False
        try:
            for index, request in enumerate(asked):
                self._turns.append(scheduler.submit(None, request, self._listener(index)))
        except BaseException:
            self._cancel()
            raise
        self._watch = asyncio.create_task(self._until_gone(http))

    def __len__(self) -> int:
        return len(self._turns)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events with the numbers of their turns, until all have ended."""
        while self._left:
            index, event = await self._events.get()
            self._left -= isinstance(event, Finished)
            yield index, event

    def close(self) -> None:
        """Breaks off what has not ended."""
        self._watch.cancel()
        self._cancel()

    def _listener(self, index: int) -> Listener:
        # Fails when the loop is closed: then nobody listens, and the scheduler breaks the turn off.
        return lambda event: self._put(index, event)

    def _put(self, index: int, event: Piece | Finished) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def _cancel(self) -> None:
        for turn in self._turns:
            turn.cancel()

    async def _until_gone(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._cancel()

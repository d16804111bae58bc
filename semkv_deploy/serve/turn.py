"""A turn of a session: what is asked, how far it has come, and what its caller hears of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.sampling import Sampler

if TYPE_CHECKING:
    from semkv_deploy.runtime.reply import ReplyBuilder

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]
Left = Literal["ended", "undone", "kept", "dropped"]
"""What a turn left of its session: it ended as it should; it was taken back, and the session is as before it; it was
kept as far as it had come, and ended; the session is gone."""


class Unavailable(SemkvError):
    """No row is free, or too many turns wait: the same call may succeed later."""


class UnknownSession(SemkvError):
    """A turn goes on with a session that is not there."""


class Failed(SemkvError):
    """A turn failed, and not by what was asked."""


class TooLong(SemkvError):
    """A prompt does not fit what is left of its session's context or cache."""


Kind = TypeVar("Kind", bound=SemkvError)


def as_kind(kind: type[Kind], error: Exception) -> Kind:
    """The error as one of a kind, with what it said."""
    if isinstance(error, SemkvError):
        return kind(error.what, where=error.where, expected=error.expected, got=error.got, fix=error.fix)
    return kind(f"internal {type(error).__name__}: {error}", where="turn")


@dataclass(frozen=True)
class Request:
    """What a turn is to do, given as one of `ids`, `text` and `messages`.

    Attributes:
        ids: tokens to append.
        text: to append as it is, without the chat template.
        messages: of a chat, the user's last of all, whose tokens the chat template makes: those that are new to the
            session; for a session without a name, all.
        max_new_tokens: most tokens generated.
        sampler: of this turn alone, so that what it draws depends on no other.
        stop_ids, stop: see `ReplyBuilder`; the model's own ends are added.
        start: True: the session begins with this turn, whatever there was of that name; False: it is gone on with, and
            refused where there is none; None: either.
        end_session: forget the session after the turn.
    """

    ids: Sequence[int] = ()
    text: str = ""
    messages: Sequence[Message] = ()
    max_new_tokens: int = 256
    sampler: Sampler = field(default_factory=Sampler)
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    start: bool | None = None
    end_session: bool = False

    def check(self) -> None:
        """Fails where the request can be served by no session.

        Raises:
            SemkvError: naming what is wrong.
        """
        given = [name for name in ("ids", "text", "messages") if len(getattr(self, name))]
        if len(given) != 1:
            raise SemkvError(
                "a turn has one of ids, text and messages", where="request", got=" and ".join(given) or "none"
            )
        if self.max_new_tokens < 1:
            raise SemkvError("out of range", where="max_new_tokens", expected="1 or more", got=self.max_new_tokens)
        if "" in self.stop:
            raise SemkvError("an empty text would end every reply", where="stop")


@dataclass(frozen=True)
class Piece:
    """Part of a reply: ids that were chosen, and the text that has become certain with them."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Finished:
    """The last that is heard of a turn.

    Attributes:
        reason: why it ended; a stop id or text, the most tokens or the row's end, its caller, or `error`.
        left: what it left of its session.
        prompt_tokens, cached_tokens: tokens that the session has seen with the prompt, and before it.
        new_tokens: generated.
    """

    reason: FinishReason
    left: Left
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    error: SemkvError | None = None


Listener = Callable[[Piece | Finished], None]

Clock = Callable[[], float]
"""Seconds; never goes back."""


class Turn:
    """One turn; `cancel` may be called from any thread.

    Attributes:
        session: its name.
        appended: prompt tokens appended so far, of `ids`.
        pending: the token that was chosen and is not appended yet.
    """

    def __init__(self, session: str, request: Request, listener: Listener, now: float) -> None:
        self.session, self.request, self._listener = session, request, listener
        self.submitted, self.last_token = now, 0.0
        self.cancelled = False
        self.finished: Finished | None = None
        self.ids: list[int] = []
        self.pinned, self.before, self.appended, self.generated = 0, 0, 0, 0
        self.pending: int | None = None
        self.reply: ReplyBuilder

    def cancel(self) -> None:
        """Asks that the turn be broken off; it hears `Finished` when that is done."""
        self.cancelled = True

    def tell(self, event: Piece | Finished) -> None:
        """Tells the caller; one that fails to listen is gone, and its turn is broken off."""
        if isinstance(event, Finished):
            self.finished = event
        try:
            self._listener(event)
        except Exception as error:
            _log.warning("the caller of a turn does not hear it, which is broken off: %s", error)
            self.cancelled = True

"""A turn of a session: what is asked, how far it has come, and what its caller hears of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.sampling import Sampler

if TYPE_CHECKING:
    from semkv_deploy.runtime.reply import ReplyBuilder

FinishReason = Literal["stop", "length", "cancelled", "error"]
Left = Literal["ended", "undone", "kept", "dropped"]
"""What a turn left of its session: it ended as it should; it was taken back, and the session is as before it; it was
kept as far as it had come, and ended; the session is gone."""


class Unavailable(SemkvError):
    """No row is free, or too many turns wait: the same call may succeed later."""


@dataclass(frozen=True)
class Request:
    """What a turn is to do.

    Attributes:
        ids: tokens to append; or
        messages: of a chat, the user's last of all, whose tokens the chat template makes.
        max_new_tokens: most tokens generated.
        sampler: of this turn alone, so that what it draws depends on no other.
        stop_ids, stop: see `ReplyBuilder`; the model's own ends are added.
        end_session: forget the session after the turn.
    """

    ids: Sequence[int] = ()
    messages: Sequence[Message] = ()
    max_new_tokens: int = 256
    sampler: Sampler = field(default_factory=Sampler)
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    end_session: bool = False


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


class Turn:
    """One turn; `cancel` may be called from any thread.

    Attributes:
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
        except Exception:
            self.cancelled = True

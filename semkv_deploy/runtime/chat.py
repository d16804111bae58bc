"""A conversation in messages, on top of a session's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.conversation import ChatFormat, Conversation
from semkv_deploy.runtime.reply import Reply, ReplyBuilder
from semkv_deploy.runtime.sampling import Sampler

if TYPE_CHECKING:
    from semkv_deploy.runtime.session import Session


def complete(
    session: Session,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    stop: Sequence[str] = (),
    sampler: Sampler | None = None,
    stream: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    pinned: int = 0,
) -> Reply:
    """Appends `ids` to a session of one row, then generates until a stop, `max_new_tokens` or the end of its room.

    Args:
        stop_ids, stop: see `ReplyBuilder`.
        stream: called with pieces of the text as they become certain, whole characters all.
        cancelled: asked after each token.
        pinned: how many of the ids, which open a conversation then, are never to be dropped.
    """
    sampler = sampler or Sampler()
    reply = ReplyBuilder(tokenizer, stop_ids, stop)

    def show(piece: str) -> None:
        if stream and piece:
            stream(piece)

    logits = _prefilled(session, list(ids), pinned)
    broken_off = False
    for _ in range(max_new_tokens):
        if broken_off := cancelled():
            break
        token = int(sampler(logits)[0])
        if reply.ends(token) or not session.has_room():
            break
        show(reply.push(token))
        if reply.stopped:
            break
        logits = session.step([token])
        reply.appended()
    show(reply.flush())
    return reply.reply(cancelled=broken_off)


def _prefilled(session: Session, ids: list[int], pinned: int) -> Any:
    """Logits after the ids; where they are refused, nothing is appended (what is pinned opens a conversation)."""
    if not pinned:
        return session.prefill(ids)
    session.prefill(ids[:pinned])
    try:
        session.pin()
        return session.prefill(ids[pinned:])
    except SemkvError:
        session.reset()
        raise


class Chat:
    """Feeds a session only what is new: what the chat template writes between one reply and the next.

    Replies stay in the cache as they were generated, whatever the template makes of old ones.

    Args:
        session: with one row, at the start of a conversation.
        tokenizer: with a chat template.
        stop_ids: ids that end a reply; those with which the template ends one are added.
        system: system message; None: the template's own.
        stop: texts that end a reply.
        vocab_size: width of the logits; ids beyond are refused. None: not checked.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        stop_ids: Sequence[int],
        system: str | None = None,
        *,
        stop: Sequence[str] = (),
        vocab_size: int | None = None,
    ) -> None:
        self.session, self._tokenizer, self._stop = session, tokenizer, tuple(stop)
        self._form = ChatFormat(tokenizer, stop_ids, vocab_size)
        self._conversation = Conversation(self._form, [{"role": "system", "content": system}] if system else [])
        self._asked: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation so far."""
        return self._conversation.messages

    def user_tokens(self, text: str) -> list[int]:
        """Ids to append for the user's next message, which `add_reply` records with its reply.

        Raises:
            SemkvError: when the template fails or refuses, or the text has tokens that the model has not.
        """
        self._asked = [{"role": "user", "content": text}]
        return self._conversation.tokens(self._asked)

    def add_reply(self, reply: Reply | Sequence[int]) -> str:
        """Records the reply to the message asked last and ends the turn; returns its text.

        Args:
            reply: or its ids, all of them in the cache.
        """
        if not isinstance(reply, Reply):
            text = self._tokenizer.decode(list(reply), skip_special_tokens=True)
            reply = Reply(text, text)
        self._conversation.record(self._asked, reply)
        self.session.end_turn()
        return reply.text

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        stream: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """One turn: the user's message in, the reply out. A message that is refused leaves no trace.

        Args:
            stream, cancelled: as for `complete`.
        """
        ids = self.user_tokens(text)
        reply = complete(
            self.session,
            self._tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            stop_ids=self._form.stop_ids,
            stop=self._stop,
            sampler=sampler,
            stream=stream,
            cancelled=cancelled,
            pinned=self._conversation.pinned if self.session.keeps_turns else 0,
        )
        self.add_reply(reply)
        return reply

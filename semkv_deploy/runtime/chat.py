"""A conversation in messages, on top of a session's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import ChatTemplate, Message
from semkv_deploy.model.turns import Turns, encode_following
from semkv_deploy.runtime.sampling import Sampler
from semkv_deploy.runtime.tokens import StopFilter, TextStream, check_ids

if TYPE_CHECKING:
    from semkv_deploy.runtime.session import Session


@dataclass(frozen=True)
class Reply:
    """A generated text.

    Attributes:
        text: without what stopped it.
        cached: the text of the tokens that the cache holds: `text`, or less, or with the beginning of a stop text.
        cancelled: whether it was broken off by the caller.
    """

    text: str
    cached: str
    cancelled: bool = False


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
        stop_ids: ids that end the text; neither shown nor appended.
        stop: texts that end it; not shown. One that is a single special token is an id.
        stream: called with pieces of the text as they become certain, whole characters all.
        cancelled: asked after each token.
        pinned: how many of the ids, which open a conversation then, are never to be dropped.
    """
    sampler = sampler or Sampler()
    ends = {*stop_ids, *_special_ids(tokenizer, stop)}
    pieces, shown = TextStream(tokenizer), StopFilter(stop)
    text: list[str] = []

    def show(piece: str) -> None:
        text.append(piece)
        if stream and piece:
            stream(piece)

    logits = _prefilled(session, list(ids), pinned)
    # Characters decoded, and of those the characters of tokens that the cache holds.
    decoded, appended, broken_off = "", 0, False
    for _ in range(max_new_tokens):
        if broken_off := cancelled():
            break
        token = int(sampler(logits)[0])
        if token in ends or not session.has_room():
            break
        piece = pieces.push(token)
        show(shown.push(piece))
        decoded += piece
        if shown.stopped:
            break
        logits = session.step([token])
        appended = len(decoded)
    rest = pieces.flush()
    show(shown.push(rest) + shown.flush())
    if not shown.stopped:
        appended = len(decoded) + len(rest)
    return Reply("".join(text), (decoded + rest)[:appended], broken_off)


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


def _special_ids(tokenizer: Any, stop: Sequence[str]) -> set[int]:
    """Ids of stop texts that are special tokens, which decoded text does not show."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in stop]
    return {ids[0] for ids in encoded if len(ids) == 1 and ids[0] in special}


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
        template = ChatTemplate.of(tokenizer)
        if template is None:
            raise SemkvError(
                "the tokenizer has no chat template",
                where="chat",
                fix="give --prompt with --raw to complete text, or a bundle of a chat model",
            )
        self.session, self._tokenizer, self._vocab_size, self._stop = session, tokenizer, vocab_size, tuple(stop)
        self._turns = Turns(template)
        self._stop_ids = (*stop_ids, *self._turns.end_ids(tokenizer))
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._last: Reply | None = None
        self._asked, self._pinned = "", 0

    def user_tokens(self, text: str) -> list[int]:
        """Ids to append for the user's next message, which `add_reply` records with its reply.

        Raises:
            SemkvError: when the template fails or refuses, or the text has tokens that the model has not.
        """
        message: Message = {"role": "user", "content": text}
        if self._last is None:
            new = self._turns.opening([*self.messages, message])
            ids = self._tokenizer.encode(new, add_special_tokens=False)
            self._pinned = self._system_tokens(ids) if self.session.keeps_turns else 0
        else:
            new = self._turns.following(self.messages[:-1], text)
            ids = encode_following(self._tokenizer, _after(self._last, new))
            self._pinned = 0
        self._asked = text
        return check_ids(self._tokenizer, ids, self._vocab_size)

    def _system_tokens(self, opening: list[int]) -> int:
        """How many tokens of an opening are the system message's: what it is without a user's."""
        alone = self._tokenizer.encode(self._turns.before_user(self.messages), add_special_tokens=False)
        same = [first == second for first, second in zip(alone, opening, strict=False)]
        return same.index(False) if False in same else len(same)

    def add_reply(self, reply: Reply | Sequence[int]) -> str:
        """Records the reply to the message asked last and ends the turn; returns its text.

        Args:
            reply: or its ids, all of them in the cache.
        """
        if not isinstance(reply, Reply):
            text = self._tokenizer.decode(list(reply), skip_special_tokens=True)
            reply = Reply(text, text)
        self.messages += [{"role": "user", "content": self._asked}, {"role": "assistant", "content": reply.text}]
        self._last = reply
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
        reply = complete(
            self.session,
            self._tokenizer,
            self.user_tokens(text),
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids,
            stop=self._stop,
            sampler=sampler,
            stream=stream,
            cancelled=cancelled,
            pinned=self._pinned,
        )
        self.add_reply(reply)
        return reply


def _after(reply: Reply, new: str) -> str:
    """The template's text after a reply, less what the cache holds of it already, with what the cache lacks of it."""
    if reply.cached.startswith(reply.text):
        begun = reply.cached[len(reply.text) :]
        return new[len(begun) :] if new.startswith(begun) else new
    return reply.text[len(reply.cached) :] + new

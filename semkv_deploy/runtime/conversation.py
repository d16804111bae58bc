"""A conversation in messages: the tokens that each turn adds to a cache, which keeps replies as they were generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import ChatTemplate, Message
from semkv_deploy.model.turns import Turns, encode_following
from semkv_deploy.runtime.reply import Reply
from semkv_deploy.runtime.tokens import check_ids


class ChatFormat:
    """What conversations of one bundle share.

    Args:
        tokenizer: with a chat template.
        stop_ids: ids that end a reply; those with which the template ends one are added.
        vocab_size: width of the logits; ids beyond are refused. None: not checked.

    Raises:
        SemkvError: when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], vocab_size: int | None = None) -> None:
        template = ChatTemplate.of(tokenizer)
        if template is None:
            raise SemkvError(
                "the tokenizer has no chat template",
                where="chat",
                fix="give --prompt with --raw to complete text, or a bundle of a chat model",
            )
        self.tokenizer, self.turns, self.vocab_size = tokenizer, Turns(template), vocab_size
        self.stop_ids = (*stop_ids, *self.turns.end_ids(tokenizer))


class Conversation:
    """Messages and replies so far, and what the chat template writes between one reply and the next.

    Args:
        messages: that precede the first user's, such as a system message.

    Attributes:
        messages: so far.
        pinned: how many tokens of the last `tokens` are the system message's, where they open the conversation.
    """

    def __init__(self, form: ChatFormat, messages: Sequence[Message] = ()) -> None:
        self._form = form
        self.messages = list(messages)
        self.pinned = 0
        self._last: Reply | None = None

    def tokens(self, new: Sequence[Message]) -> list[int]:
        """Ids to append before the reply to `new`, which `record` records with its reply.

        Args:
            new: messages after the last reply, the user's last of all.

        Raises:
            SemkvError: when the template fails or refuses, or the text has tokens that the model has not.
        """
        form = self._form
        if self._last is None:
            opening = [*self.messages, *new]
            ids = form.tokenizer.encode(form.turns.opening(opening), add_special_tokens=False)
            self.pinned = self._system_tokens(opening, ids)
        else:
            text = form.turns.following(self.messages[:-1], new)
            ids = encode_following(form.tokenizer, _after(self._last, text))
            self.pinned = 0
        return check_ids(form.tokenizer, ids, form.vocab_size)

    def record(self, new: Sequence[Message], reply: Reply) -> None:
        """Adds messages and the reply to them."""
        self.messages += [*new, {"role": "assistant", "content": reply.text}]
        self._last = reply

    def state(self) -> dict[str, Any]:
        """The conversation as JSON takes it."""
        return {"messages": list(self.messages), "cached": None if self._last is None else self._last.cached}

    @classmethod
    def restored(cls, form: ChatFormat, state: dict[str, Any]) -> Conversation:
        """The conversation that `state` is of."""
        conversation = cls(form, state["messages"])
        if state["cached"] is not None:
            conversation._last = Reply(conversation.messages[-1]["content"], state["cached"])
        return conversation

    def _system_tokens(self, opening: Sequence[Message], ids: Sequence[int]) -> int:
        """How many tokens of an opening are its system messages': what it is without a user's."""
        users = next((at for at, message in enumerate(opening) if message["role"] != "system"), len(opening))
        text = self._form.turns.before_user(opening[:users])
        alone = self._form.tokenizer.encode(text, add_special_tokens=False)
        same = [first == second for first, second in zip(alone, ids, strict=False)]
        return same.index(False) if False in same else len(same)


def _after(reply: Reply, new: str) -> str:
    """The template's text after a reply, less what the cache holds of it already, with what the cache lacks of it."""
    if reply.cached.startswith(reply.text):
        begun = reply.cached[len(reply.text) :]
        return new[len(begun) :] if new.startswith(begun) else new
    return reply.text[len(reply.cached) :] + new

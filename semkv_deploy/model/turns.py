"""The turns of a chat as a template writes them: what opens it, what stands between a reply and the next one.

A cache holds a reply as it was generated, so earlier turns are never written again, and a template may render them as
it likes: without their thinking, trimmed, spaced anew. What is new is found with a reply that the template cannot
know: a conversation is rendered with it, and the text after it is what follows any reply.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import ChatTemplate, Message

_REPLIES = ("{}", "<think>\n\n</think>\n\n{}")
"""Forms of the unknown reply: some templates want thinking in it."""

_MARKUP = re.compile(r"\s*[<\[|]")


class Turns:
    """What a chat template adds to a conversation, turn by turn."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def opening(self, messages: Sequence[Message]) -> str:
        """The text before the first reply.

        Raises:
            SemkvError: as `ChatTemplate.render`; when only the system message is refused, it says so.
        """
        try:
            return self._template.render(messages, add_generation_prompt=True)
        except SemkvError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages) or not self._takes(others):
                raise
            raise SemkvError(
                "the model's chat template takes no system message",
                where="--system",
                got=error.got,
                fix="leave it out, and say it in the prompt",
            ) from None

    def before_user(self, messages: Sequence[Message]) -> str:
        """The text of system messages alone, with which an opening begins; empty where the template gives none.

        Args:
            messages: system messages.
        """
        try:
            return self._template.render(messages, add_generation_prompt=False) if messages else ""
        except SemkvError:
            # Some templates want a user's message.
            return ""

    def following(self, messages: Sequence[Message], user: str) -> str:
        """The text between the last reply and the next: the turn's end, the user's message, what opens a reply.

        Args:
            messages: the conversation until the message that was replied to last, included.
            user: the user's next message.

        Raises:
            SemkvError: when the template fails, refuses the conversation or does not show replies.
        """
        return self._after_reply(messages, [{"role": "user", "content": user}], prompt=True)

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Ids of the tokens with which the template ends a reply (or, without such, opens the next turn)."""
        asked: list[Message] = [{"role": "user", "content": "Hello"}]
        other = _mark([])
        ids = []
        for following in ([], [{"role": "user", "content": other}]):
            with contextlib.suppress(SemkvError):
                text = self._after_reply(asked, following, prompt=False)
                first = _first_marker(text.split(other, 1)[0], tokenizer)
                if first is not None:
                    ids.append(first)
        return tuple(dict.fromkeys(ids))

    def _after_reply(self, before: Sequence[Message], after: Sequence[Message], *, prompt: bool) -> str:
        """The text that follows a reply between these messages."""
        mark = _mark([message["content"] for message in (*before, *after)])
        failure: SemkvError | None = None
        for form in _REPLIES:
            reply = {"role": "assistant", "content": form.format(mark)}
            try:
                text = self._template.render([*before, reply, *after], add_generation_prompt=prompt)
            except SemkvError as error:
                failure = failure or error
                continue
            if mark in text:
                return text.split(mark, 1)[1].replace(mark, "")
        raise failure or SemkvError(
            "the chat template does not show replies, so a chat cannot go on", where="chat template"
        )

    def _takes(self, messages: Sequence[Message]) -> bool:
        try:
            self._template.render(messages, add_generation_prompt=True)
        except SemkvError:
            return False
        return True


def _mark(texts: Sequence[str]) -> str:
    """Digits that occur in none of the texts: no template turns them to capitals or trims them."""
    while True:
        mark = str(secrets.randbelow(9 * 10**15) + 10**15)
        if not any(mark in text for text in texts):
            return mark


def _first_marker(text: str, tokenizer: Any) -> int | None:
    """The first token of a text that is markup and no words: a special one, or an added one such as <|user|>."""
    added = tokenizer.added_tokens_decoder
    for token in tokenizer.encode(text, add_special_tokens=False):
        entry = added.get(token)
        if token in tokenizer.all_special_ids or (
            entry is not None and (entry.special or _MARKUP.match(entry.content))
        ):
            return int(token)
    return None


def encode_following(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that follows other text: no space is put before it, as SentencePiece does before a first word."""
    before = "x"
    head = tokenizer.encode(before, add_special_tokens=False)
    whole = tokenizer.encode(before + text, add_special_tokens=False)
    if whole[: len(head)] == head:
        return list(whole[len(head) :])
    return list(tokenizer.encode(text, add_special_tokens=False))

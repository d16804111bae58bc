"""A conversation in messages, on top of a session's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.tokens import TextStream

if TYPE_CHECKING:
    from semkv_deploy.runtime.sampling import Sampler
    from semkv_deploy.runtime.session import Session


class Chat:
    """Feeds a session only what is new: the chat template's text since the last reply, then the reply as generated.

    Args:
        session: with one row, at the start of a conversation.
        tokenizer: with a chat template.
        stop_ids: ids that end a reply.
        system: system message; None: the template's own.
    """

    def __init__(self, session: Session, tokenizer: Any, stop_ids: Sequence[int], system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise SemkvError(
                "the tokenizer has no chat template",
                where="chat",
                fix="give --prompt with --raw to complete text, or a bundle of a chat model",
            )
        self.session, self._tokenizer, self._stop_ids = session, tokenizer, stop_ids
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._fed = ""
        """Text of the conversation that the cache already holds."""

    def user_tokens(self, text: str) -> list[int]:
        """Ids to append for the next user message: what the template adds to the text the cache holds."""
        self.messages.append({"role": "user", "content": text})
        rendered = self._tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        if not rendered.startswith(self._fed):
            raise SemkvError(
                "the chat template rewrites earlier turns, so the cache cannot be continued",
                where="chat",
                expected="a template whose text only grows",
            )
        new = rendered[len(self._fed) :]
        self._fed = rendered
        return self._tokenizer.encode(new, add_special_tokens=False)

    def add_reply(self, tokens: list[int]) -> str:
        """Records a reply whose ids are in the cache and ends the turn; returns its text."""
        reply = self._tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": reply})
        self._fed += reply
        self.session.end_turn()
        return reply

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """One turn: the user's message in, the reply out.

        Args:
            stream: called with pieces of the reply as they become certain.
        """
        shown = TextStream(self._tokenizer)

        def show(row: int, token: int) -> None:
            if stream:
                stream(shown.push(token))

        (reply,) = self.session.generate(
            self.user_tokens(text),
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            stop_ids=self._stop_ids,
            callback=show,
        )
        return self.add_reply(reply)

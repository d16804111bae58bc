"""Bodies of OpenAI's API as they are answered with: whole replies, pieces of a stream, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.http.requests import BadRequest
from semkv_deploy.serve.turn import Failed, Finished, TooLong, Unavailable


class Replies:
    """Bodies of one call.

    Args:
        chat: /v1/chat/completions, or /v1/completions.
        model: the name under which the bundle is served.
    """

    def __init__(self, *, chat: bool, model: str) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], ends: Sequence[Finished]) -> dict[str, Any]:
        """The answer to a call without a stream."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": end.reason})
        return {**self._head, "object": kind, "choices": choices, "usage": usage(ends)}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk(index, role="assistant", content="") for index in range(count)] if self._chat else []

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A piece of a choice's text."""
        return self._chunk(index, content=text)

    def end(self, index: int, end: Finished) -> dict[str, Any]:
        """The end of a choice."""
        return self._chunk(index, reason=end.reason)

    def usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """The piece that has the counts, where they are asked for."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage(ends)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, index: int, reason: str | None = None, **delta: str) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}


def usage(ends: Sequence[Finished]) -> dict[str, Any]:
    """Counts of tokens; a prompt's are all that the session has seen, those that it had seen before included."""
    prompt, new = sum(end.prompt_tokens for end in ends), sum(end.new_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends)},
    }


def error_body(error: SemkvError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error, as OpenAI's clients read it."""
    status, kind, code, param = 400, "invalid_request_error", None, None
    if isinstance(error, BadRequest):
        status, code, param = error.status, error.code, error.param
    elif isinstance(error, TooLong):
        code = "context_length_exceeded"
    elif isinstance(error, Unavailable):
        status, kind, code = 503, "server_error", "unavailable"
    elif isinstance(error, Failed):
        status, kind, code = 500, "server_error", "internal_error"
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}

"""The tensors of a Triton model: their names and types, as config.pbtxt declares them and as requests bring them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.sampling import Sampler
from semkv_deploy.serve.turn import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

START, END = 1, 2
"""Flags of a request in a sequence: its first, its last."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: all inputs are optional.

    Attributes:
        type: Triton's name of the element type, without TYPE_.
        size: -1: any number of elements.
    """

    name: str
    type: str
    size: int
    says: str


INPUTS = (
    Tensor("text_input", "STRING", 1, "the user's message; with raw, or without a chat template, text as it is"),
    Tensor("input_ids", "INT64", -1, "tokens to append, instead of a text"),
    Tensor("system", "STRING", 1, "system message, before the first message of a session"),
    Tensor("raw", "BOOL", 1, "append the text without the chat template"),
    Tensor("session_id", "STRING", 1, "the session; else the correlation id; without both the turn stands alone"),
    Tensor("start_session", "BOOL", 1, "the session begins with this turn; else the sequence's START flag"),
    Tensor("end_session", "BOOL", 1, "the session is forgotten after the turn; else the sequence's END flag"),
    Tensor("max_tokens", "INT32", 1, "most tokens generated; default: what the model's max_tokens is, at most 256"),
    Tensor("temperature", "FP32", 1, "default 0: greedy"),
    Tensor("top_p", "FP32", 1, "default 1"),
    Tensor("top_k", "INT32", 1, "default 0: all"),
    Tensor("seed", "UINT64", 1, "default: another one each time"),
    Tensor("stop", "STRING", -1, "texts that end the reply, and are no part of it"),
    Tensor("stop_ids", "INT64", -1, "ids that end the reply, and are no part of it"),
    Tensor("stream", "BOOL", 1, "default true: a response a token; false: one response"),
)

OUTPUTS = (
    Tensor("output_ids", "INT64", -1, "tokens generated since the last response"),
    Tensor("text_output", "STRING", 1, "text that has become certain with them"),
    Tensor("finish_reason", "STRING", 1, "in the last response: stop, length, or ended where only a session did"),
    Tensor("prompt_tokens", "INT64", 1, "in the last response: tokens that the session has seen with the prompt"),
    Tensor("cached_tokens", "INT64", 1, "in the last response: tokens that it had seen before"),
)

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Asked:
    """What a Triton request asks for.

    Attributes:
        session: its name; None: the turn stands alone.
        request: None: only that the session ends.
        stream: a response a token, or one.
    """

    session: str | None
    request: Request | None
    stream: bool


class Inputs:
    """The inputs of one request.

    Args:
        given: arrays by name.
    """

    def __init__(self, given: dict[str, NDArray[Any]]) -> None:
        self._given = given

    def several(self, name: str) -> list[Any]:
        """All elements; strings decoded.

        Raises:
            SemkvError: for a string that is not UTF-8.
        """
        elements = self._given[name].reshape(-1).tolist() if name in self._given else []
        try:
            return [each.decode("utf-8") if isinstance(each, bytes) else each for each in elements]
        except UnicodeDecodeError:
            raise SemkvError("not UTF-8 text", where=name) from None

    def one(self, name: str, default: Any = None) -> Any:
        """The one element, or the default where the input is not given.

        Raises:
            SemkvError: for any other number of elements.
        """
        elements = self.several(name)
        if len(elements) > 1 or (name in self._given and not elements):
            raise SemkvError("not one element", where=name, expected=1, got=len(elements))
        return elements[0] if elements else default


def read(
    given: dict[str, NDArray[Any]], correlation_id: int | str, flags: int, *, has_template: bool, max_tokens: int
) -> Asked:
    """What a request asks for.

    Args:
        given: inputs by name.
        correlation_id, flags: of the sequence; 0 or empty: it is in none.
        max_tokens: most that may be asked for.

    Raises:
        SemkvError: naming the input that is wrong.
    """
    inputs = Inputs(given)
    session = inputs.one("session_id") or (f"sequence {correlation_id}" if correlation_id else None)
    start = bool(inputs.one("start_session", bool(flags & START)))
    end = bool(inputs.one("end_session", bool(flags & END)))
    if session is None and (start or end):
        raise SemkvError(
            "a session begins or ends, and has no name", where="session_id", fix="give session_id, or a correlation id"
        )
    stream = bool(inputs.one("stream", True))
    ids, text = inputs.several("input_ids"), inputs.one("text_input", "")
    if end and not start and not ids and not text:
        return Asked(session, None, stream)
    if bool(ids) == bool(text):
        what = "both" if ids else "none"
        raise SemkvError("a turn has a text or tokens", where="text_input, input_ids", expected="one of them", got=what)
    return Asked(
        session,
        Request(
            ids=ids,
            **_text(inputs, text, has_template),
            max_new_tokens=inputs.one("max_tokens", min(DEFAULT_MAX_TOKENS, max_tokens)),
            sampler=_sampler(inputs),
            stop=inputs.several("stop"),
            stop_ids=inputs.several("stop_ids"),
            start=start if session is not None else None,
            end_session=end or session is None,
        ),
        stream,
    )


def _text(inputs: Inputs, text: str, has_template: bool) -> dict[str, Any]:
    system = inputs.one("system")
    chat = bool(text) and has_template and not inputs.one("raw", False)
    if system is not None and not chat:
        raise SemkvError("only a chat has a system message", where="system", fix="give text_input, without raw")
    if not chat:
        return {"text": text}
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return {"messages": [*messages, {"role": "user", "content": text}]}


def _sampler(inputs: Inputs) -> Sampler:
    temperature, top_p = float(inputs.one("temperature", 0.0)), float(inputs.one("top_p", 1.0))
    return Sampler(temperature, top_p, inputs.one("seed", secrets.randbits(64)), inputs.one("top_k", 0))

"""Bodies of OpenAI's API as they are asked with, and what they ask of the scheduler.

What is not served is refused by name: a parameter that is read over would give another answer than the one asked for.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.sampling import Sampler
from semkv_deploy.serve.turn import Request

IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Parameters that say something about the call and nothing about the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""Parameters that are not served, with the values (and null) that ask for nothing."""


class BadRequest(SemkvError):
    """A body that asks for what is not served.

    Args:
        param: the parameter, as OpenAI's errors name it.
        code: OpenAI's.
        status: of HTTP.
    """

    def __init__(self, what: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(what, where=param)
        self.param, self.code, self.status = param, code, status


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampling(_Strict):
    """What both kinds of call have."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        """The parameter that says how many tokens to generate at most, and what it says."""
        return "max_tokens", self.max_tokens

    def sampler(self) -> Sampler:
        """OpenAI's defaults: temperature 1, another seed each time."""
        seed = secrets.randbits(64) if self.seed is None else self.seed % 2**64
        temperature = 1.0 if self.temperature is None else self.temperature
        top_k = self.top_k if self.top_k is not None and self.top_k > 0 else 0
        return Sampler(temperature, 1.0 if self.top_p is None else self.top_p, seed, top_k)

    def new_tokens(self, limit: int) -> int:
        """How many tokens to generate at most: what was asked for, or as many as the server allows.

        Raises:
            BadRequest: for more than it allows.
        """
        param, asked = self.most_tokens
        if asked is not None and asked > limit:
            raise BadRequest(f"at most {limit} tokens are generated in one reply, got {asked}", param=param)
        return limit if asked is None else asked

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> Message:
        """The message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(Sampling):
    """Of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().most_tokens

    def asked(self, limit: int) -> list[Request]:
        """The turn that is asked for."""
        if self.messages[-1].role != "user":
            raise BadRequest("the last message has to be the user's", param="messages")
        messages = [message.plain() for message in self.messages]
        return [
            Request(messages=messages, max_new_tokens=self.new_tokens(limit), sampler=self.sampler(), stop=self.stops())
        ]


Ids = Annotated[list[int], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class CompletionBody(Sampling):
    """Of /v1/completions."""

    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]

    def asked(self, limit: int) -> list[Request]:
        """A turn for each prompt, in a session of its own that ends with it.

        Where nothing is said OpenAI generates 16 tokens.
        """
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        most = min(16, limit) if self.max_tokens is None else self.new_tokens(limit)
        return [
            Request(
                ids=() if isinstance(each, str) else each,
                text=each if isinstance(each, str) else "",
                max_new_tokens=most,
                sampler=self.sampler(),
                stop=self.stops(),
                end_session=True,
            )
            for each in ([prompt] if one else prompt)
        ]


Body = TypeVar("Body", ChatBody, CompletionBody)


def parse(kind: type[Body], data: bytes, model: str) -> Body:
    """Reads a body.

    Args:
        model: the name under which the bundle is served.

    Raises:
        BadRequest: for one that is not JSON or not of this kind, or asks for what is not served.
    """
    try:
        raw = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadRequest("the body is not a JSON object")
    given = {name: value for name, value in raw.items() if value is not None and name not in IGNORED}
    for name in [name for name in NEUTRAL if name in given and name not in kind.model_fields]:
        # 1 and True are equal in Python, and not in JSON.
        value = given.pop(name)
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]
        ):
            raise BadRequest("this parameter is not supported", param=name, code="unsupported_parameter")
    _drop_empty(given.get("messages"))
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        # Where one of several types is taken, the one that fitted furthest is what was meant.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        raise BadRequest(first["msg"], param=_param(first["loc"], given)) from None
    if body.model != model:
        raise BadRequest(
            f"the model {body.model!r} does not exist; {model!r} is served",
            param="model",
            code="model_not_found",
            status=404,
        )
    if body.stream_options is not None and not body.stream:
        raise BadRequest("only allowed with stream", param="stream_options")
    return body


def _param(place: Sequence[Any], given: Any) -> str:
    """Where a mistake is, in what was given: pydantic's place also has the names of types that were tried."""
    parts = []
    for part in place:
        if (isinstance(given, dict) and part in given) or (isinstance(given, list) and isinstance(part, int)):
            given = given[part]
            parts.append(str(part))
    # What is missing is not in what was given.
    return ".".join(parts or [str(place[0])])


def _asks_nothing(name: str, value: object) -> bool:
    # 1 and True are equal in Python, and not in JSON.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name])


def _drop_empty(messages: object) -> None:
    """Removes what replies of OpenAI's clients carry along and is empty: `"refusal": null`, `"tool_calls": []`."""
    for message in messages if isinstance(messages, Sequence) else ():
        if isinstance(message, dict):
            for name in [name for name, value in message.items() if value is None or value == []]:
                if name != "content":
                    del message[name]

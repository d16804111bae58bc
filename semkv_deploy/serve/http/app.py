"""OpenAI's API over a scheduler: /v1/chat/completions, /v1/completions, /v1/models, and /health and /metrics."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.http.call import Call, Event
from semkv_deploy.serve.http.replies import Replies, error_body
from semkv_deploy.serve.http.requests import BadRequest, Body, ChatBody, CompletionBody, parse
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.statistics import prometheus
from semkv_deploy.serve.turn import Failed, Finished, Unavailable, as_kind

CLIENT_GONE = 499
"""Status of what nobody reads, as proxies log it."""


@dataclass(frozen=True)
class Options:
    """How a bundle is served.

    Attributes:
        name: of the model.
        api_key: asked for everywhere but at /health; None: for nothing.
        max_body: bytes of a request's body.
    """

    name: str
    api_key: str | None = None
    max_body: int = 1 << 22


def create_app(scheduler: Scheduler, options: Options) -> FastAPI:
    """The application; the scheduler is started and closed by who runs it."""
    app = FastAPI(title="semkv-deploy", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    app.add_middleware(_KeyCheck, key=options.api_key)

    @app.exception_handler(SemkvError)
    async def _known(http: Request, error: SemkvError) -> Response:
        return _refused(error)

    @app.exception_handler(HTTPException)
    async def _of_routes(http: Request, error: HTTPException) -> Response:
        return _refused(BadRequest(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code))

    @app.exception_handler(Exception)
    async def _unforeseen(http: Request, error: Exception) -> Response:
        return _refused(as_kind(Failed, error))

    @app.post("/v1/chat/completions")
    async def _chat(http: Request) -> Response:
        return await _answer(ChatBody, http, chat=True)

    @app.post("/v1/completions")
    async def _complete(http: Request) -> Response:
        return await _answer(CompletionBody, http, chat=False)

    async def _answer(kind: type[Body], http: Request, *, chat: bool) -> Response:
        body = parse(kind, await _read(http, options.max_body), options.name)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        call = Call(scheduler, http, body.asked(scheduler.max_new_tokens))
        replies = Replies(chat=chat, model=options.name)
        return await (_stream(call, replies, include_usage) if body.stream else _whole(call, replies))

    @app.get("/v1/models")
    async def _models() -> dict[str, Any]:
        return {"object": "list", "data": [_model()]}

    @app.get("/v1/models/{name:path}")
    async def _one_model(name: str) -> dict[str, Any]:
        if name != options.name:
            raise BadRequest(f"the model {name!r} does not exist", param="model", code="model_not_found", status=404)
        return _model()

    def _model() -> dict[str, Any]:
        contract = scheduler.session.contract
        return {
            "id": options.name,
            "object": "model",
            "created": started,
            "owned_by": "semkv-deploy",
            "max_model_len": contract.max_context,
            "budget": contract.budget,
        }

    @app.get("/health")
    async def _health() -> Response:
        if scheduler.failure is not None:
            return JSONResponse({"status": "failed", "error": str(scheduler.failure)}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def _metrics() -> Response:
        text = prometheus(scheduler.statistics, scheduler.held())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


class _KeyCheck:
    """Lets through what has the key, and everybody to /health."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._expected = app, None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http" and scope["path"] != "/health" and self._expected is not None:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                app = _refused(BadRequest("a wrong API key, or none", code="invalid_api_key", status=401))
        await app(scope, receive, send)


def _refused(error: SemkvError) -> Response:
    status, body = error_body(error)
    headers = {"Retry-After": "1"} if status == 503 else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body, status, headers)


async def _read(http: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        BadRequest: for one that is longer, or not sent as JSON: what a form on some web page can send is not.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("the body has to be sent as application/json", status=415)
    data = bytearray()
    async for piece in http.stream():
        data += piece
        if len(data) > most:
            raise BadRequest(f"the body is longer than {most} bytes", status=413)
    return bytes(data)


def _check(event: Event) -> None:
    """Raises what a turn ended with, where it did not end as it should."""
    end = event[1]
    if isinstance(end, Finished) and end.error is not None:
        raise end.error
    if isinstance(end, Finished) and end.reason == "cancelled":
        raise Unavailable("the server is ending", where="scheduler")


async def _whole(call: Call, replies: Replies) -> Response:
    texts = [""] * len(call)
    ends: dict[int, Finished] = {}
    try:
        async for index, event in call:
            _check((index, event))
            if isinstance(event, Finished):
                ends[index] = event
            else:
                texts[index] += event.text
    except SemkvError:
        if call.gone:
            return Response(status_code=CLIENT_GONE)
        raise
    finally:
        call.close()
    return JSONResponse(replies.whole(texts, [ends[index] for index in sorted(ends)]))


async def _stream(call: Call, replies: Replies, include_usage: bool) -> Response:
    """Server-sent events; what is refused before anything was said has a status of its own."""
    events = aiter(call)
    try:
        first = await anext(events)
        _check(first)
    except BaseException:
        call.close()
        raise

    async def pieces() -> AsyncIterator[str]:
        ends: dict[int, Finished] = {}
        try:
            for chunk in replies.opening(len(call)):
                yield _sent(chunk)
            async with aclosing(_with(first, events)) as heard:
                async for index, event in heard:
                    _check((index, event))
                    if isinstance(event, Finished):
                        ends[index] = event
                        yield _sent(replies.end(index, event))
                    elif event.text:
                        yield _sent(replies.piece(index, event.text))
            if include_usage:
                yield _sent(replies.usage(list(ends.values())))
            yield "data: [DONE]\n\n"
        except SemkvError as error:
            yield _sent(error_body(error)[1])
        finally:
            call.close()

    return StreamingResponse(pieces(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _with(first: Event, rest: AsyncIterator[Event]) -> AsyncGenerator[Event, None]:
    yield first
    async for event in rest:
        yield event


def _sent(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"

"""The HTTP application. One rule throughout: a client that goes away takes its generation with it.

A streamed answer's first part is awaited before the response begins, so that a full queue is still a 503 and no broken
stream. An error after that arrives as an event with OpenAI's error object, and the stream ends without [DONE].
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.bench.target import Target
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.openai.answers import AnswerStream, Part
from puzzle_trtllm.serve.openai.errors import ApiError, error_of_server, unavailable
from puzzle_trtllm.serve.openai.model_card import ModelCard
from puzzle_trtllm.serve.openai.protocol import ChatRequest, CompletionRequest, StreamOptions
from puzzle_trtllm.serve.openai.replies import Reply, usage_json
from puzzle_trtllm.serve.triton.session import LONG_TEXTS_AT_ONCE

T = TypeVar("T")
IsHealthy = Callable[[], bool]
Metrics = Callable[[], str | None]
CLIENT_GONE = 499
"""nginx's status for a client that did not wait; nobody reads it."""
MAX_BODY_BYTES = 16 << 20
"""Of a request: several times the token ids of a million. All streams stand still while it becomes JSON, for seconds
and with some 900 MB where it was made for that."""
_LONG_BODY = 64 << 10
"""Bytes from which requests become JSON and tokens a few at a time, for the memory that this takes."""


def make_app(
    card: ModelCard,
    client: AbstractAsyncContextManager[Target],
    *,
    api_key: str | None = None,
    is_healthy: IsHealthy = lambda: True,
    metrics: Metrics = lambda: None,
) -> FastAPI:
    """The application in front of `client`. With `api_key`, all but /health wants `Authorization: Bearer KEY`.

    is_healthy, metrics: asked, in a thread, at every GET of /health and /metrics.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client as target:
            app.state.target = target
            yield

    app = FastAPI(title="puzzle-trtllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())
    model = {"id": card.name, "object": "model", "created": created, "owned_by": "puzzle-trtllm"}
    model["max_model_len"] = card.max_seq_len

    long_prompts = ThreadPoolExecutor(LONG_TEXTS_AT_ONCE)

    async def in_thread(request: Request, read: Callable[[bytes, Reply], T], reply: Reply) -> T:
        content = await _body(request)
        loop = asyncio.get_running_loop()
        if len(content) <= _LONG_BODY:
            return await loop.run_in_executor(None, read, content, reply)
        made = await _unless_gone(request, loop.run_in_executor(long_prompts, read, content, reply))
        if made is None:
            raise ClientDisconnect
        return made

    def read_chat(content: bytes, reply: Reply) -> tuple[ChatRequest, GenerationRequest]:
        body = _parsed(content, card, ChatRequest)
        return body, card.of_chat(body, reply.id)

    def read_completion(content: bytes, reply: Reply) -> tuple[CompletionRequest, list[GenerationRequest]]:
        body = _parsed(content, card, CompletionRequest)
        return body, [card.of_completion(body, prompt, reply.id) for prompt in body.prompts()]

    async def chat_completions(request: Request) -> Response:
        reply = Reply.begin(model=card.name, chat=True)
        body, generation = await in_thread(request, read_chat, reply)
        harmony = card.tokenizer.tokenizer if card.has_channels else None
        answer = AnswerStream(app.state.target, generation, harmony=harmony, stops=body.stops)
        return await _respond(request, reply, [answer], body)

    async def completions(request: Request) -> Response:
        reply = Reply.begin(model=card.name, chat=False)
        body, generations = await in_thread(request, read_completion, reply)
        answers = [AnswerStream(app.state.target, each, harmony=None) for each in generations]
        return await _respond(request, reply, answers, body)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        card.require(request.path_params["name"])
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        if not await asyncio.to_thread(is_healthy):
            raise unavailable("the engine or its server is down")
        return JSONResponse({"status": "ok"})

    async def server_metrics(request: Request) -> Response:
        text = await asyncio.to_thread(metrics)
        if text is None:
            raise unavailable("the server's metrics cannot be read")
        return PlainTextResponse(text)

    for method, path, route in (
        ("POST", "/v1/chat/completions", chat_completions),
        ("POST", "/v1/completions", completions),
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{name:path}", one_model),
        ("GET", "/metrics", server_metrics),
    ):
        app.add_api_route(path, _guarded(route, api_key), methods=[method])
    app.add_api_route("/health", health, methods=["GET"])
    _add_error_handlers(app)
    return app


async def check_server(client: AbstractAsyncContextManager[Target]) -> None:
    """Connect once. Raises ServeError, which a starting application would bury under a traceback."""
    async with client as target:
        if not target.gives_token_ids:
            raise ServeError("the server behind gives no token ids", expected="a server started by `serve`")


def _guarded(
    route: Callable[[Request], Awaitable[Response]], api_key: str | None
) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        if api_key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
                kind = "authentication_error"
                raise ApiError("wrong or missing API key", status=401, kind=kind, code="invalid_api_key")
        return await route(request)

    guarded.__annotations__ = {"request": Request, "return": Response}
    return guarded


def _add_error_handlers(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), status_code=error.status)

    async def server_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        return await api_error(request, error_of_server(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await api_error(request, ApiError(f"{request.url.path}: {error.detail}", status=error.status_code))

    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def our_fault(request: Request, error: Exception) -> Response:
        found = ApiError("internal error; the server's log says more", status=500, kind="server_error")
        return await api_error(request, found)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(ServeError, server_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(Exception, our_fault)


R = TypeVar("R", ChatRequest, CompletionRequest)


def _parsed(content: bytes, card: ModelCard, kind: type[R]) -> R:
    parsed = kind.parse(_json_of(content))
    card.require(parsed.model)
    return parsed


async def _body(request: Request) -> bytes:
    """Raises ApiError, 413, for one that is too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(f"the request body has more than {MAX_BODY_BYTES:,} bytes", status=413)
        parts.append(part)
    return b"".join(parts)


def _json_of(body: bytes) -> Any:
    """Raises ApiError for what is no JSON, and for JSON that neither the tokenizer nor our own answer could carry."""
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError("the request body holds half of a surrogate pair, which is no text") from None
    except ValueError:
        raise ApiError("the request body is not JSON") from None
    except RecursionError:
        raise ApiError("the request body is nested too deeply") from None
    return content


async def _respond(
    request: Request, reply: Reply, answers: list[AnswerStream], body: ChatRequest | CompletionRequest
) -> Response:
    if not body.stream:
        choices = await _unless_gone(request, _gather_all(answers))
        if choices is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(reply.whole(choices, [answer.usage for answer in answers]))
    events = _events(reply, answers[0], body.stream_options or StreamOptions())
    first = await _unless_gone(request, _first_of(events))
    if first is None:
        return Response(status_code=CLIENT_GONE)
    return StreamingResponse(
        _after(first, events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _first_of(events: AsyncGenerator[str, None]) -> str:
    return await anext(events)


async def _after(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        yield first
        try:
            async for event in events:
                yield event
        except ServeError as error:
            yield _event(error_of_server(error).body())


async def _events(reply: Reply, answer: AnswerStream, options: StreamOptions) -> AsyncGenerator[str, None]:
    """Server-sent events. The first comes when the server has answered for the first time."""

    def event(chunk: dict[str, Any]) -> str:
        if options.include_usage:
            chunk = chunk | {"usage": usage_json([answer.usage]) if options.continuous_usage_stats else None}
        return _event(chunk)

    begun = False
    async with aclosing(answer.parts()) as parts:
        async for part in parts:
            if not begun and (reply.chat or not part.content):  # clients time their first token by it
                yield event(reply.opening())
            begun = True
            for chunk in reply.part(part):
                yield event(chunk)
    yield event(reply.closing(answer.finish_reason))
    if options.include_usage:
        yield _event(reply.usage(answer.usage))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _gather_all(answers: list[AnswerStream]) -> list[tuple[Part, str]]:
    """Every answer whole; when one fails the others are cancelled."""
    tasks = [asyncio.create_task(_whole(answer)) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(answer: AnswerStream) -> tuple[Part, str]:
    async with aclosing(answer.parts()) as stream:
        parts = [part async for part in stream]
    whole = Part(reasoning="".join(p.reasoning for p in parts), content="".join(p.content for p in parts))
    return whole, answer.finish_reason


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client goes first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

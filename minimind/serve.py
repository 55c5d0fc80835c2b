"""An OpenAI-compatible endpoint for one weight: /v1/models and /v1/chat/completions.

It listens on 127.0.0.1 only and answers every wrong request with OpenAI's error object. Many
streams run at once: each takes its turn for one token, first come first served, so none starves.
Left out: batching the streams into one forward pass (what vLLM is for), tools, log-probabilities.
A request that asks for what is left out is refused, not half-answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.errors import UserError
from minimind.generate import stream
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

HOST = "127.0.0.1"
MAX_BODY = 256 * 1024  # bytes of one request
MAX_CONTEXT = 4096  # tokens of prompt and answer, or what the model was built for if that is less
MAX_TOKENS, DEFAULT_TOKENS = 1024, 256  # of one answer
MAX_OPEN = 64  # answers in the making

STATUS = {"model_not_found": 404, "rate_limit_exceeded": 429, "body_too_large": 413, "forbidden_host": 403,
          "internal_error": 500}  # fmt: skip
# Any other parameter might change the answer, so it is refused unless it has a value that does not.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
UNCHANGED: dict[str, tuple] = {
    "n": (1,), "best_of": (1,), "stop": ([], ""), "tools": ([],), "functions": ([],), "logprobs": (False,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "top_k": (0, -1), "min_p": (0,), "tool_choice": ("none", "auto"), "modalities": (["text"],),
}  # fmt: skip


class Part(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """Return it as the tokenizer takes it."""
        parts = self.content if isinstance(self.content, list) else []
        text = "".join(part.text for part in parts) if parts else self.content
        if any("\ud800" <= character <= "\udfff" for character in text or ""):
            raise ApiError("A message has half a surrogate pair.", "invalid_value", "messages")
        return {"role": self.role, "content": text or ""}


class Ask(BaseModel):
    """A request for an answer, in OpenAI's words."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**31)
    stream: bool = False
    stream_options: dict[str, Any] | None = None


class ApiError(Exception):
    """A refusal; the fields are OpenAI's."""

    def __init__(
        self, message: str, code: str, param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = STATUS.get(code, status), code, param

    def response(self) -> JSONResponse:
        """Return it as OpenAI's clients expect it."""
        return JSONResponse(self.content(), self.status)

    def content(self) -> dict:
        """Return OpenAI's error object."""
        kinds = {429: "rate_limit_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


BROKEN = ApiError("Something here is broken; its log says what.", "internal_error")


class Guard:
    """ASGI middleware: requests of this machine only, and bodies of at most MAX_BODY bytes.

    A body that is too long is read to its end and thrown away, so that the client hears the reason.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").split(":")[0]
        page = headers.get(b"origin", f"http://{HOST}").partition("://")[2].split(":")[0]
        if not {host, page} <= {
            HOST,
            "localhost",
        }:  # a web page, perhaps with its name pointing here
            refusal = ApiError(f"This server answers to {HOST} only.", "forbidden_host")
            return await refusal.response()(scope, receive, send)
        body, size, more = b"", 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False) and size < 64 * MAX_BODY
            body = body + message.get("body", b"") if size <= MAX_BODY else b""
        if size > MAX_BODY:
            refusal = ApiError(f"The body has more than {MAX_BODY} bytes.", "body_too_large")
            return await refusal.response()(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


class Engine:
    """One model and its answers in the making."""

    def __init__(self, model: MiniMind, tokenizer: Tokenizer, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.context = min(MAX_CONTEXT, model.config.max_position_embeddings)
        self.turn, self.open = asyncio.Lock(), 0

    def prepare(self, ask: Ask) -> tuple[list[int], int]:
        """Return the prompt's ids and the length of the answer. ApiError if it cannot be given."""
        if ask.model != self.name:
            raise ApiError(
                f"No model {ask.model!r}, only {self.name!r}.", "model_not_found", "model"
            )
        for name, value in (ask.model_extra or {}).items():
            if value is not None and name not in HARMLESS and value not in UNCHANGED.get(name, ()):
                words = f"{name}={value!r} is not offered."
                raise ApiError(words[:500], "unsupported_parameter", name)
        messages = [message.plain() for message in ask.messages]
        prompt = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
        asked, room = ask.max_completion_tokens or ask.max_tokens, self.context - len(prompt)
        if room < (asked or 1):
            sizes = f"{len(prompt)} tokens of messages and {asked or 1} of answer"
            limit = f"do not fit into the context of {self.context}."
            raise ApiError(f"{sizes} {limit}", "context_length_exceeded", "messages")
        return prompt, asked or min(DEFAULT_TOKENS, room)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of MAX_OPEN places. ApiError if there is none."""
        if self.open >= MAX_OPEN:
            raise ApiError(f"{MAX_OPEN} answers are in the making.", "rate_limit_exceeded")
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def answer(
        self, ask: Ask, prompt: list[int], length: int
    ) -> AsyncIterator[tuple[str, list[int]]]:
        """Yield (new text, all ids so far), a token at a time; half a character waits for its rest."""
        heat, top_p = (1.0 if given is None else given for given in (ask.temperature, ask.top_p))
        sampling = {"temperature": heat, "top_p": top_p, "seed": ask.seed}
        steps = stream(self.model, prompt, length, eos_id=self.tokenizer.eos_id, **sampling)
        ids: list[int] = []
        sent = 0
        while True:
            async with self.turn:  # asyncio's lock is fair
                token = await run_in_threadpool(self.next_token, steps)
            if token is not None:
                ids.append(token)
            text = self.tokenizer.decode(ids)
            if token is None or not text.endswith("\ufffd"):
                yield text[sent:], ids
                sent = len(text)
            if token is None:
                return

    def next_token(self, steps: Iterator[int]) -> int | None:
        """Return the next id, or None at the end. ApiError if the model cannot make it."""
        try:
            return next(steps, None)
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("An answer broke off.")
            raise BROKEN from error

    def reason(self, ids: list[int]) -> str:
        """Return why an answer ended."""
        return "stop" if ids and ids[-1] == self.tokenizer.eos_id else "length"


def usage(prompt: list[int], ids: list[int]) -> dict[str, int]:
    """Return OpenAI's count of tokens."""
    asked, answered = len(prompt), len(ids)
    total = asked + answered
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": total}


async def whole_answer(
    engine: Engine, ask: Ask, prompt: list[int], length: int, request: Request
) -> dict:
    """Return a chat.completion object; nobody hears it, and it stops, if the client has gone."""
    text, ids = "", []
    with engine.place():
        async for piece, ids in engine.answer(ask, prompt, length):  # noqa: B007
            text += piece
            if await request.is_disconnected():
                break
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": engine.reason(ids)}
    return {**heading(engine, "chat.completion"), "choices": [choice], "usage": usage(prompt, ids)}


async def event_stream(
    engine: Engine, ask: Ask, prompt: list[int], length: int
) -> AsyncIterator[str]:
    """Yield server-sent events: chunks, the last with the reason it ended, then [DONE].

    What breaks on the way is an event too, and the last one.
    """
    head, ids = heading(engine, "chat.completion.chunk"), []

    def event(delta: dict, reason: str | None = None) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return f"data: {json.dumps({**head, 'choices': choices})}\n\n"

    with engine.place():
        yield event({"role": "assistant", "content": ""})
        try:
            async for piece, ids in engine.answer(ask, prompt, length):  # noqa: B007
                if piece:
                    yield event({"content": piece})
        except ApiError as error:
            yield f"data: {json.dumps(error.content())}\n\n"
            return
    yield event({}, engine.reason(ids))
    if (ask.stream_options or {}).get("include_usage"):
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(prompt, ids)})}\n\n"
    yield "data: [DONE]\n\n"


async def begun(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Return the same events, the first of them made: it has its place, or was refused one."""
    first = await anext(events)

    async def all_of_them() -> AsyncIterator[str]:
        yield first
        async for event in events:
            yield event

    return all_of_them()


def heading(engine: Engine, kind: str) -> dict:
    """Return what every response object starts with."""
    stamp = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    return {**stamp, "object": kind, "model": engine.name}


def make_app(model: MiniMind, tokenizer: Tokenizer, name: str) -> FastAPI:
    """Return the application that serves a model under a name."""
    engine = Engine(model, tokenizer, name)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "minimind"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions", response_model=None)
    async def completions(ask: Ask, request: Request) -> dict | StreamingResponse:
        prompt, length = engine.prepare(ask)
        if ask.stream:
            events = await begun(event_stream(engine, ask, prompt, length))
            return StreamingResponse(events, media_type="text/event-stream")
        return await whole_answer(engine, ask, prompt, length, request)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return ApiError(f"The body is not JSON: {first['msg']}.", "invalid_json").response()
        words = f"{place or 'body'}: {first['msg']}."
        return ApiError(words, "invalid_value", place or None).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        words = f"{request.method} {request.url.path}: {error.detail}."
        code = "unknown_url" if error.status_code in (404, 405) else "invalid_request"
        return ApiError(words, code, status=error.status_code).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return BROKEN.response()

    return app


def make_server(app: FastAPI, port: int) -> tuple[uvicorn.Server, socket.socket]:
    """Return a server and the socket it will listen on. UserError if the port is taken."""
    listener = socket.socket()
    if os.name == "posix":  # elsewhere it would let two servers share the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"Port {port} cannot be used ({error}). Choose another --port.") from error
    return uvicorn.Server(uvicorn.Config(app, log_level="warning")), listener


def serve(model: MiniMind, tokenizer: Tokenizer, name: str, port: int) -> None:
    """Serve until interrupted."""
    server, listener = make_server(make_app(model, tokenizer, name), port)
    where = f"http://{HOST}:{listener.getsockname()[1]}/v1"
    print(f"Serving {name!r} at {where} (this machine only; Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn shuts down, then raises it again
        server.run(sockets=[listener])

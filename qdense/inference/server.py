"""An OpenAI-compatible server: `qdense serve`. FastAPI reads and checks requests, `engine.py` completes them.

    GET  /v1/models             the base and its adapters
    POST /v1/chat/completions   a conversation, in the template that the adapter was trained with
    POST /v1/completions        plain text
    GET  /health                whether the engine works; needs no key

What OpenAI's protocol has and this server does not do is refused by name, never ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from qdense.data.rows import Message
from qdense.data.templates import Template
from qdense.errors import DataError, did_you_mean
from qdense.inference.engine import BusyError, Engine, Part, Request, StoppedError
from qdense.inference.generation import Decoding
from qdense.text import clean

_MOST_BODY_BYTES = 4 * 2**20
_MOST_CHOICES = 64  # of one request
_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_bearer = HTTPBearer(auto_error=False)


# --- what a request may say ------------------------------------------------------------------------------------------------


def _list_of_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Body(BaseModel):
    """What both kinds of request have. A field that is not listed is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=_MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]] | None, BeforeValidator(_list_of_stops)
    ] = Field(None, max_length=16)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Only the values that change nothing.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    # Notes of the client's, which change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def decoding(self) -> Decoding:
        """OpenAI's defaults: temperature 1, all tokens, another seed each time."""
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return Decoding("request", temperature=temperature, top_p=float(self.top_p or 1), seed=seed)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool | None = None


class _TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]
    name: Any = None
    refusal: None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatBody(_Body):
    messages: list[_Turn] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: _PlainText | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    parallel_tool_calls: Any = None

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class _PlainText(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class CompletionBody(_Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [token for token in self.prompt if isinstance(token, int)]
        return [ids] if ids else [prompt for prompt in self.prompt if not isinstance(prompt, int)]


# --- the application -------------------------------------------------------------------------------------------------------


def make_app(engine: Engine, base_name: str, key: str | None) -> FastAPI:
    """The application.

    Args:
        base_name: by which clients ask for the bare base; adapters have their own names.
        key: what clients must send; None admits all, but only at this machine's own addresses.
    """
    app = FastAPI(title="qdense", openapi_url=None)
    created = int(time.time())
    names: dict[str, str | None] = {name: name for name in engine.loaded.adapters}
    if all(adapter.is_separate for adapter in engine.loaded.adapters.values()):
        names = {base_name: None, **names}

    def authorized(sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
        if key is not None and not (
            sent is not None and secrets.compare_digest(sent.credentials.encode(), key.encode())
        ):
            raise _error(
                401,
                "wrong or missing key: send the one that `qdense serve` printed, or QDENSE_API_KEY",
                code="invalid_api_key",
            )

    guarded = [Depends(authorized)]
    if key is None:
        # A page in the user's browser could otherwise reach this server under a name of its own.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    app.add_middleware(_LimitedBody)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)

    def known(model: str) -> str | None:
        if model not in names:
            raise _error(
                404,
                f'no model "{model[:100]}"{did_you_mean(model[:100], names)}',
                param="model",
                code="model_not_found",
            )
        return names[model]

    @app.get("/health")
    def health() -> JSONResponse:
        running, waiting = engine.load()
        return JSONResponse(
            {"status": engine.failure or "ok", "running": running, "waiting": waiting},
            status_code=503 if engine.failure else 200,
        )

    @app.get("/v1/models", dependencies=guarded)
    def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": created, "owned_by": "qdense"} for name in names],
        }

    @app.post("/v1/chat/completions", dependencies=guarded, response_model=None)
    async def chat(body: ChatBody, http: HTTPRequest) -> JSONResponse | StreamingResponse:
        model = known(body.model)
        messages = [turn.message() for turn in body.messages]
        try:
            ids = await asyncio.to_thread(engine.conversation_ids, model, messages)
        except DataError as error:
            raise _error(400, str(error), param="messages") from None
        limit = body.max_completion_tokens or body.max_tokens
        job = _Job(engine, body, model, [ids], limit, body.num_logprobs(), engine.template(model))
        return await job.answer(http, _ChatFormat(engine, body.model))

    @app.post("/v1/completions", dependencies=guarded, response_model=None)
    async def completions(body: CompletionBody, http: HTTPRequest) -> JSONResponse | StreamingResponse:
        model = known(body.model)
        vocabulary = len(engine.loaded.base.tokenizer)
        ids = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                try:
                    ids.append(await asyncio.to_thread(engine.text_ids, prompt))
                except DataError as error:
                    raise _error(400, str(error), param="prompt") from None
            elif all(0 <= token < vocabulary for token in prompt):
                ids.append(prompt)
            else:
                raise _error(400, f"token ids are whole numbers from 0 to {vocabulary - 1}", param="prompt")
        job = _Job(engine, body, model, ids, body.max_tokens or 16, body.num_logprobs(), None)
        return await job.answer(http, _TextFormat(engine, body.model))

    return app


# --- errors, in OpenAI's form ------------------------------------------------------------------------------------------------


def _error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> HTTPException:
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail = {"message": clean(message), "type": kind, "param": param, "code": code}
    return HTTPException(status, detail=detail, headers={"Retry-After": "1"} if status in (429, 503) else None)


async def _on_http_error(http: HTTPRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    detail: Any = error.detail
    if not isinstance(detail, dict):  # of the framework: no such address, wrong method
        detail = _error(error.status_code, f"{http.method} {http.url.path[:200]}: {detail}").detail
    return JSONResponse({"error": detail}, status_code=error.status_code, headers=dict(error.headers or {}))


async def _on_invalid(http: HTTPRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:200] or "the body"
    if first["type"] == "extra_forbidden":
        reason = "is not supported by this server"
    elif first["type"] == "too_long" and place in ("tools", "logit_bias"):
        reason = "is not supported by this server; leave it out"
    else:
        reason = first["msg"][:1].lower() + first["msg"][1:]
    return JSONResponse({"error": _error(400, f"{place}: {reason}", param=place).detail}, status_code=400)


class _LimitedBody:
    """Refuses bodies that are too large, before they are in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def limited() -> ASGIMessage:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > _MOST_BODY_BYTES:
                raise _error(413, f"a request may have {_MOST_BODY_BYTES // 2**20} MiB")
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


# --- one request -------------------------------------------------------------------------------------------------------------


class _ChatFormat:
    """What an answer to a conversation looks like."""

    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model = engine, model

    def choice(self, text: str, logprobs: Sequence[Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(logprobs)}

    def delta(self, text: str, logprobs: Sequence[Any] | None, *, is_first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if is_first else {"content": text}
        return {"delta": delta, "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, logprobs: Sequence[Any] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.engine.token_text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                entry(token, logprob) | {"top_logprobs": [entry(*each) for each in best]}
                for token, logprob, best in logprobs
            ],
            "refusal": None,
        }


class _TextFormat:
    """What a completion of plain text looks like."""

    whole = chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model = engine, model

    def choice(self, text: str, logprobs: Sequence[Any] | None) -> dict[str, Any]:
        if logprobs is None:
            return {"text": text, "logprobs": None}
        tokens = [self.engine.token_text(token) for token, _, _ in logprobs]
        offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0))
        best = [{self.engine.token_text(token): value for token, value in each} for _, _, each in logprobs]
        values = [value for _, value, _ in logprobs]
        found = {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}
        return {"text": text, "logprobs": found}

    def delta(self, text: str, logprobs: Sequence[Any] | None, *, is_first: bool) -> dict[str, Any]:
        return self.choice(text, logprobs)


@dataclass
class _Job:
    """The sequences of one HTTP request: n answers to each of its prompts."""

    engine: Engine
    body: _Body
    model: str | None
    prompts: Sequence[list[int]]
    max_new_tokens: int | None
    num_logprobs: int | None
    template: Template | None

    async def answer(self, http: HTTPRequest, form: _ChatFormat | _TextFormat) -> JSONResponse | StreamingResponse:
        parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        requests = self._submit(parts)
        self.id, self.created = form.prefix + secrets.token_hex(12), int(time.time())
        if self.body.stream:
            return StreamingResponse(self._events(requests, parts, form), media_type="text/event-stream")
        with self._cancelling(requests):
            collecting = asyncio.create_task(self._collect(len(requests), parts))
            leaving = asyncio.create_task(_disconnected(http))
            try:
                await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not collecting.done():
                    return JSONResponse({}, status_code=499)  # nobody reads it
                choices = collecting.result()
            finally:
                collecting.cancel()
                leaving.cancel()
        content = self._head(form.whole, form.model) | {
            "choices": [
                {"index": index, "finish_reason": _REASONS[str(last.finish)]} | form.choice(text, logprobs)
                for index, (text, last, logprobs) in enumerate(choices)
            ],
            "usage": self._usage(last.num_tokens for _, last, _ in choices),
        }
        return JSONResponse(content)

    def _submit(self, parts: asyncio.Queue[tuple[int, Part]]) -> list[Request]:
        """Queue all sequences, or none. Raises HTTPException."""
        loop, decoding, count = asyncio.get_running_loop(), self.body.decoding(), self.body.n or 1
        if not 1 <= len(self.prompts) * count <= _MOST_CHOICES:
            raise _error(400, f"a request may ask for 1 to {_MOST_CHOICES} answers, prompts times n", param="n")
        requests: list[Request] = []

        def receiver(index: int) -> Any:
            def on_part(part: Part) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(parts.put_nowait, (index, part))

            return on_part

        for number, ids in enumerate(self.prompts):
            for sample in range(count):
                request = Request(
                    ids,
                    self.model,
                    replace(decoding, seed=decoding.seed + sample),
                    self.max_new_tokens or max(1, self.engine.max_length - len(ids)),
                    receiver(number * count + sample),
                    self.template,
                    tuple(self.body.stop or ()),
                    self.num_logprobs,
                )
                try:
                    self.engine.submit(request)
                except (DataError, BusyError, StoppedError) as error:
                    for other in requests:
                        self.engine.cancel(other)
                    if isinstance(error, DataError):
                        raise _error(400, str(error), code="context_length_exceeded") from None
                    raise _error(429 if isinstance(error, BusyError) else 503, str(error)) from None
                requests.append(request)
        return requests

    @contextlib.contextmanager
    def _cancelling(self, requests: Iterable[Request]) -> Any:
        """However this ends, nothing goes on being written for a client that has left."""
        try:
            yield
        finally:
            for request in requests:
                self.engine.cancel(request)

    async def _collect(
        self, count: int, parts: asyncio.Queue[tuple[int, Part]]
    ) -> list[tuple[str, Part, list[Any] | None]]:
        """The text, the last part and the log probabilities of each sequence. Raises HTTPException."""
        texts: list[list[str]] = [[] for _ in range(count)]
        logprobs: list[list[Any]] = [[] for _ in range(count)]
        last: dict[int, Part] = {}
        while len(last) < count:
            index, part = await parts.get()
            if part.error is not None:
                raise _error(500, part.error)
            texts[index].append(part.text)
            logprobs[index] += part.logprobs
            if part.finish is not None:
                last[index] = part
        return [
            ("".join(texts[i]), last[i], logprobs[i] if self.num_logprobs is not None else None) for i in range(count)
        ]

    async def _events(
        self, requests: Sequence[Request], parts: asyncio.Queue[tuple[int, Part]], form: _ChatFormat | _TextFormat
    ) -> AsyncIterator[str]:
        head = self._head(form.chunk, form.model)
        options = self.body.stream_options
        has_usage = options is not None and bool(options.include_usage)
        begun: set[int] = set()
        last: dict[int, Part] = {}
        with self._cancelling(requests):
            while len(last) < len(requests):
                index, part = await parts.get()
                if part.error is not None:
                    yield _event({"error": _error(500, part.error).detail})
                    return
                if part.finish is not None:
                    last[index] = part
                elif not part.text and not part.logprobs and index in begun:
                    continue  # a token that completes no character
                logprobs = part.logprobs if self.num_logprobs is not None else None
                delta = form.delta(part.text, logprobs, is_first=index not in begun)
                begun.add(index)
                reason = _REASONS[part.finish] if part.finish else None
                choice = {"index": index, "finish_reason": reason} | delta
                yield _event(head | {"choices": [choice]} | ({"usage": None} if has_usage else {}))
            if has_usage:
                yield _event(head | {"choices": [], "usage": self._usage(part.num_tokens for part in last.values())})
            yield "data: [DONE]\n\n"

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": model}

    def _usage(self, num_tokens: Iterable[int]) -> dict[str, int]:
        prompt, written = sum(map(len, self.prompts)), sum(num_tokens)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _disconnected(http: HTTPRequest) -> None:
    """Returns when the client has left. Its body has been read, so nothing else arrives."""
    while (await http.receive())["type"] != "http.disconnect":
        pass

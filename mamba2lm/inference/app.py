"""The endpoints of OpenAI's API, on one engine.

The event loop here reads requests and writes answers; the model runs in the worker's thread, so a
slow client delays nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mamba2lm.inference.answers import (
    Answer,
    ChatAnswer,
    CompletionAnswer,
    EventStream,
    Running,
    busy,
    explained,
    internal,
    timed_out,
)
from mamba2lm.inference.api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse,
)
from mamba2lm.inference.chat import ChatTemplate
from mamba2lm.inference.config import API_KEY_VARIABLE, ServeConfig
from mamba2lm.inference.engine import Engine
from mamba2lm.inference.metrics import Histogram, LabelledCounter, plain
from mamba2lm.inference.request import Request
from mamba2lm.inference.worker import BusyError, SessionBusyError, Turn, Worker
from mamba2lm.schema import ConfigError

log = logging.getLogger(__name__)

_CLIENT_GONE = 499


class Server:
    """What the endpoints share."""

    def __init__(self, config: ServeConfig, engine: Engine, model_name: str) -> None:
        """Bind an engine; nothing runs yet.

        Args:
            config: Checked.
            engine: For this server alone.
            model_name: The name that requests use.

        Raises:
            ConfigError: The chat template is none.
        """
        self.config = config
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.model_name = model_name
        self.draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.created = int(time.time())
        # For ids and seeds: a generator of ours, as asking the system each time takes long.
        self.random = random.Random(secrets.randbits(128))
        self.worker = Worker(
            engine, max_waiting=config.max_waiting, session_bytes=config.session_mib << 20
        )
        key = config.api_key or os.environ.get(API_KEY_VARIABLE)
        self._key = key.encode() if key else None
        source = self.tokenizer.chat_template
        if config.chat_template is not None:
            try:
                source = Path(config.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    "chat_template", config.chat_template, f"cannot be read as text ({error})."
                ) from error
        self.template = ChatTemplate(source, self.tokenizer.eos_token) if source else None
        self.answered = LabelledCounter(
            "mamba2lm_requests_total", "Requests by endpoint and status.", ["endpoint", "status"]
        )
        self.first_token = Histogram(
            "mamba2lm_time_to_first_token_seconds", "From a request to its first token."
        )
        self.between_tokens = Histogram(
            "mamba2lm_inter_token_seconds", "Between two deliveries of a streamed continuation."
        )
        self.duration = Histogram(
            "mamba2lm_request_seconds", "From a request to the end of its answer."
        )

    def drain(self) -> None:
        """Refuse what is new from here on, and end what runs when its time is up."""
        if self.draining:
            return
        self.draining = True
        log.info("draining for at most %g s", self.config.drain_timeout)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(
                self._loop.call_later, self.config.drain_timeout, self.worker.stop
            )

    @property
    def has_key(self) -> bool:
        """Whether requests must carry one."""
        return self._key is not None

    def app(self) -> FastAPI:
        """Return the application."""

        @contextlib.asynccontextmanager
        async def running(_: FastAPI) -> AsyncIterator[None]:
            self._loop = asyncio.get_running_loop()
            self.worker.start()
            yield
            self.worker.stop()
            await asyncio.to_thread(self.worker.join)

        app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(HTTPException, _http_error)
        for path, method, handle in (
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name:path}", "GET", self.model),
            ("/v1/completions", "POST", self.completions),
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/sessions/{name:path}", "DELETE", self.end_session),
            ("/health", "GET", self.health),
            ("/metrics", "GET", self.metrics),
        ):
            # As Starlette's route: these endpoints read their requests themselves.
            app.add_route(path, self._guarded(path, handle), methods=[method])
        return app

    def _guarded(
        self, endpoint: str, handle: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Return an endpoint that checks the key and answers every error in the API's shape."""

        async def guarded(request: HttpRequest) -> Response:
            began = time.perf_counter()
            try:
                if endpoint != "/health":
                    self._check_key(request)
                response = await handle(request)
            except ApiError as error:
                response = _error_response(error)
            except ClientDisconnect:
                response = Response(status_code=_CLIENT_GONE)
            except Exception:
                log.exception("a mistake of ours while answering %s", endpoint)
                response = _error_response(internal())
            self.answered.add(endpoint, str(response.status_code))
            if request.method == "POST" and not isinstance(response, EventStream):
                self.duration.observe(time.perf_counter() - began)
            return response

        return guarded

    def _check_key(self, request: HttpRequest) -> None:
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._key)
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401, "The API key is missing or wrong.", code="invalid_api_key",
                kind="authentication_error",
            )  # fmt: skip

    async def models(self, _: HttpRequest) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: HttpRequest) -> Response:
        """Describe it."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.model_name, "object": "model", "created": self.created,
            "owned_by": "mamba2lm",
        }  # fmt: skip

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    async def health(self, _: HttpRequest) -> Response:
        """Say whether requests are served."""
        if self.draining or not self.worker.alive:
            status = "draining" if self.draining else "the engine has failed"
            return JSONResponse({"status": status}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: HttpRequest) -> Response:
        """Give the numbers to Prometheus."""
        engine, worker = self.engine, self.worker
        stats, cache = engine.stats, engine.cache
        finished = LabelledCounter(
            "mamba2lm_continuations_total", "Continuations by how they ended.", ["reason"]
        )
        gauges = (
            ("running_rows", "Continuations that decode.", len(engine.batch)),
            ("reading_prompts", "Prompts being read.", engine.reading),
            ("waiting_prompts", "Prompts in the queue.", worker.waiting),
            ("batch_state_bytes", "Buffers of the running batch.", engine.batch.nbytes),
            ("cached_states", "States in the cache.", len(cache)),
            ("cached_state_bytes", "Bytes of them.", cache.nbytes),
            ("sessions", "Sessions kept.", worker.sessions),
            ("session_bytes", "Bytes of their states.", worker.sessions_nbytes),
        )
        counters = (
            ("prompt_tokens_total", "Prompt tokens read.", stats.prompt_tokens),
            ("cached_tokens_total", "Prompt tokens found in the cache.", stats.cached_tokens),
            ("generated_tokens_total", "Tokens drawn.", stats.new_tokens),
            ("steps_total", "Steps of the running batch.", stats.steps),
            ("cache_hits_total", "Prompts that began like a cached one.", cache.hits),
            ("cache_misses_total", "Prompts that did not.", cache.misses),
            ("cache_evictions_total", "States that left for others.", cache.evictions),
            ("session_evictions_total", "Sessions that did.", worker.sessions_evicted),
        )
        lines: list[str] = []
        for kind, numbers in (("gauge", gauges), ("counter", counters)):
            for name, meaning, value in numbers:
                lines += plain(kind, f"mamba2lm_{name}", meaning, value)
        lines += finished.of(stats.finished).lines()
        for series in (self.answered, self.first_token, self.between_tokens, self.duration):
            lines += series.lines()
        return PlainTextResponse(
            "\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def end_session(self, request: HttpRequest) -> Response:
        """Forget a session."""
        name = request.path_params["name"]
        if not self.worker.alive:
            raise internal()
        told: asyncio.Queue[str] = asyncio.Queue()
        self.worker.forget(name, told.put_nowait)
        found = await told.get()
        if found == "busy":
            raise explained(SessionBusyError())
        if found == "none":
            raise ApiError(404, "There is no such session.", param="session")
        return JSONResponse({"id": name, "object": "session", "deleted": True})

    async def completions(self, request: HttpRequest) -> Response:
        """Continue prompts."""
        asked = parse(CompletionRequest, await self._body(request))
        self._check_model(asked.model)
        prompts, n = asked.prompts, asked.n or 1
        best_of = asked.best_of or n
        _require(best_of >= n, "best_of", "must be at least n.")
        _require(not (asked.stream and best_of > n), "best_of", "cannot be streamed.")
        self._check_counts(asked, max(best_of, len(prompts)))
        await self._check_format(asked)
        _require(len(prompts) > 0, "prompt", "is empty.")
        encode = self.tokenizer.encode
        ids: list[list[int]] = []
        texts: list[str] = []
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else ""
            _require_text(text, "prompt")
            if isinstance(prompt, str):
                tokens = await asyncio.to_thread(encode, prompt)
                tokens = tokens if asked.session else [self.tokenizer.eos_id, *tokens]
            else:
                tokens = prompt
                _require(len(tokens) > 0, "prompt", "is empty.")
                wrong = [i for i in tokens if i >= self.engine.model.vocab_size]
                _require(not wrong, "prompt", f"holds {wrong[:1]}, which is no token.")
                text = self.tokenizer.decode(tokens) if asked.echo else ""
            self._check_length(len(tokens), "prompt")
            ids.append(tokens)
            texts.append(text)
        max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
        seed = self.random.getrandbits(62) if asked.seed is None else asked.seed
        # best_of chooses by log-probabilities, whether or not they are shown.
        logprobs = asked.logprobs if best_of == n or asked.logprobs is not None else 0
        requests: list[Request | Turn] = []
        if asked.session is not None:
            _require(self.config.session_mib > 0, "session", "is not kept by this server.")
            _require(len(prompts) == best_of == 1, "session", "has one prompt and one reply.")
            _require(max_tokens > 0, "max_tokens", "must be ≥ 1 with a session.")
            _require(not asked.echo, "echo", "is not for sessions.")
            ignore_eos = bool(asked.ignore_eos)
            requests.append(
                Turn(asked.session, ids[0], asked.sampling, max_tokens, seed, logprobs, ignore_eos)
            )
        else:
            requests += [
                Request(
                    tokens,
                    asked.sampling,
                    max_tokens,
                    seeds=range(seed, seed + best_of),
                    logprobs=logprobs,
                    prompt_logprobs=bool(asked.echo) and asked.logprobs is not None,
                    ignore_eos=bool(asked.ignore_eos),
                    stream=bool(asked.stream),
                )
                for tokens in ids
            ]
        answer = CompletionAnswer(self, asked, ids, texts, n)
        return await self._answer(request, requests, asked, answer, best_of)

    async def chat(self, request: HttpRequest) -> Response:
        """Reply to messages."""
        asked = parse(ChatRequest, await self._body(request))
        self._check_model(asked.model)
        if self.template is None:
            raise ApiError(
                400,
                "This model's tokenizer has no chat template; use /v1/completions, or start the "
                "server with chat_template=FILE.",
                param="messages",
                code="no_chat_template",
            )
        messages = [message.plain() for message in asked.messages]
        for message in messages:
            _require_text(message["content"] + message["role"], "messages")
        n = asked.n or 1
        self._check_counts(asked, n)
        await self._check_format(asked)
        top = asked.top_logprobs
        _require(top is None or bool(asked.logprobs), "top_logprobs", "needs logprobs to be true.")
        try:
            text = await asyncio.to_thread(self.template.render, messages)
        except ValueError as error:
            raise ApiError(400, f"{error}.", param="messages") from error
        ids = await asyncio.to_thread(self.tokenizer.encode_with_specials, text)
        _require(len(ids) > 0, "messages", "make an empty text.")
        self._check_length(len(ids), "messages")
        limit = asked.max_completion_tokens
        limit = asked.max_tokens if limit is None else limit
        limit = self.config.max_new_tokens if limit is None else limit
        seed = self.random.getrandbits(62) if asked.seed is None else asked.seed
        requests: list[Request | Turn] = [
            Request(
                ids,
                asked.sampling,
                limit,
                seeds=range(seed, seed + n),
                logprobs=(top or 0) if asked.logprobs else None,
                ignore_eos=bool(asked.ignore_eos),
                stream=bool(asked.stream),
                cache_reply=n == 1,
            )
        ]
        answer = ChatAnswer(self, asked, [ids], [""], n)
        return await self._answer(request, requests, asked, answer, n)

    def _check_counts(self, asked: GenerationRequest, choices: int) -> None:
        most = min(self.config.max_choices, self.engine.max_rows)
        _require(choices <= most, "n", f"at most {most} choices and prompts in one request.")
        limit = self.config.max_new_tokens
        wanted = max(asked.max_tokens or 0, getattr(asked, "max_completion_tokens", None) or 0)
        _require(wanted <= limit, "max_tokens", f"must be at most {limit} on this server.")
        streamed = bool(asked.stream) or asked.stream_options is None
        _require(streamed, "stream_options", "needs stream to be true.")
        for stop in asked.stop or []:
            _require_text(stop, "stop")

    async def _check_format(self, asked: GenerationRequest) -> None:
        """Read what the text must follow, off the loop: a large one takes a while."""
        if asked.response_format is None:
            return
        try:
            await asyncio.to_thread(self.engine.constraints.begin, asked.sampling)
        except ConfigError as error:
            message = f"response_format: {error.remedy}"
            raise ApiError(400, message, param="response_format") from error

    def _check_length(self, tokens: int, param: str) -> None:
        limit = self.config.max_prompt_tokens
        if tokens > limit:
            raise ApiError(
                400,
                f"{param}: has {tokens} tokens; this server takes at most {limit}.",
                param=param,
                code="context_length_exceeded",
            )

    async def _body(self, request: HttpRequest) -> bytes:
        """Read a request's body, no longer and no slower than allowed."""
        if self.draining:
            raise busy(503, "The server is shutting down.")
        limit = self.config.max_body_bytes
        too_large = ApiError(413, f"The body has more than {limit} bytes.", code="body_too_large")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.body_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, "The body did not arrive in time.", code="timeout") from error
        return bytes(body)

    async def _answer(
        self,
        http: HttpRequest,
        requests: Sequence[Request | Turn],
        asked: GenerationRequest,
        answer: Answer,
        rows: int,
    ) -> Response:
        try:
            tickets = self.worker.submit(list(requests))
        except BusyError as error:
            if not self.worker.alive:
                raise internal() from error
            raise busy(429, "The server has as many requests as it can queue.") from error
        running = Running(self, tickets, rows, streamed=bool(asked.stream))
        if asked.stream:
            return EventStream(self, running, answer)
        gone = asyncio.create_task(_disconnected(http))
        done = asyncio.create_task(running.whole())
        try:
            async with asyncio.timeout(self.config.request_timeout):
                await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            choices = done.result()
        except TimeoutError as error:
            raise timed_out() from error
        finally:
            running.cancel()
            for task in (gone, done):
                task.cancel()
        return JSONResponse(answer.whole(choices, running))


async def _disconnected(request: HttpRequest) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _require(good: bool, param: str, message: str) -> None:
    if not good:
        raise ApiError(400, f"{param}: {message}", param=param)


def _require_text(text: str, param: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{param}: is not Unicode text.", param=param) from error


def _error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    # What was not read of a refused body must not be taken for the next request.
    if error.status in (408, 413):
        headers["connection"] = "close"
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "There is no such endpoint.", 405: "The endpoint does not take that method."}
    text = message.get(error.status_code, str(error.detail))
    return _error_response(ApiError(error.status_code, text))

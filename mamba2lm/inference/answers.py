"""What the server answers: choices as they grow, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mamba2lm.inference.api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    chat_logprobs,
    completion_logprobs,
    finish_reason,
)
from mamba2lm.inference.decoding import FinishReason, TokenLogprob
from mamba2lm.inference.worker import Piece, SessionBusyError, SessionGoneError, Ticket
from mamba2lm.schema import ConfigError

if TYPE_CHECKING:
    from mamba2lm.inference.app import Server

LAST_WORDS = 5
"""Seconds for what has to be written when time is up."""
_RETRY_AFTER = 1


@dataclass
class Choice:
    """One continuation as it grows."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """Take what is new."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.reason = piece.finish_reason or self.reason

    @property
    def likelihood(self) -> float:
        """Mean log-probability of a token."""
        return sum(t.logprob for t in self.logprobs) / max(len(self.logprobs), 1)


class Running:
    """Submitted requests and what has come of them."""

    def __init__(self, server: Server, tickets: list[Ticket], rows: int, *, streamed: bool) -> None:
        self.tickets = tickets
        self.rows = rows * len(tickets)
        """Continuations of all prompts."""
        self._server = server
        self._rows = rows
        self._streamed = streamed

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield what comes, with the number of the prompt; ends when all has.

        Raises:
            ApiError: A request failed.
        """
        if len(self.tickets) == 1:
            async for piece in self._of(self.tickets[0]):
                yield 0, piece
            return
        merged: asyncio.Queue[tuple[int, Piece] | ApiError | None] = asyncio.Queue()

        async def forward(i: int, ticket: Ticket) -> None:
            try:
                async for piece in self._of(ticket):
                    merged.put_nowait((i, piece))
                merged.put_nowait(None)
            except ApiError as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(forward(i, t)) for i, t in enumerate(self.tickets)]
        try:
            left = len(tasks)
            while left:
                found = await merged.get()
                if isinstance(found, ApiError):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()

    async def _of(self, ticket: Ticket) -> AsyncIterator[Piece]:
        ended: set[int] = set()
        last: dict[int, float] = {}
        server = self._server
        while len(ended) < self._rows:
            piece = await ticket.pieces.get()
            if self._rows == 1:
                # What has come meanwhile goes out together: a slow client gets fewer, larger parts.
                while piece.error is None and not ticket.pieces.empty():
                    piece = piece.followed_by(ticket.pieces.get_nowait())
            if piece.error is not None:
                raise explained(piece.error)
            if piece.tokens:
                if piece.row in last:
                    if self._streamed:  # others are told at their ends only
                        server.between_tokens.observe(piece.at - last[piece.row])
                elif not last:
                    server.first_token.observe(piece.at - ticket.submitted_at)
                last[piece.row] = piece.at
            if piece.finish_reason is not None:
                ended.add(piece.row)
                if piece.finish_reason == "interrupted":
                    raise busy(503, "The server is shutting down.")
            yield piece

    async def whole(self) -> list[list[Choice]]:
        """Return all choices of each prompt, once they have ended."""
        choices = [[Choice() for _ in range(self._rows)] for _ in self.tickets]
        async for i, piece in self.pieces():
            choices[i][piece.row].add(piece)
        return choices

    def cancel(self) -> None:
        """End what has not ended."""
        for ticket in self.tickets:
            if ticket.job is None or not ticket.job.done:
                self._server.worker.cancel(ticket)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the state cache."""
        return sum(ticket.job.cached_tokens for ticket in self.tickets if ticket.job is not None)


class Answer:
    """What is answered, in the shape of one of the endpoints."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(
        self,
        server: Server,
        asked: GenerationRequest,
        prompts: list[list[int]],
        texts: list[str],
        n: int,
    ) -> None:
        self.server = server
        self.asked = asked
        self.prompts = prompts
        self.texts = texts
        self.n = n
        self.tokens = 0
        self.include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._head = {
            "id": f"{self.prefix}-{server.random.getrandbits(128):032x}",
            "created": int(time.time()),
            "model": server.model_name,
            "system_fingerprint": None,
        }

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every part of the answer has."""
        return {**self._head, "object": kind}

    def whole(self, choices: list[list[Choice]], running: Running) -> dict[str, Any]:
        """Return the answer of a request that is not streamed."""
        shown = []
        for i, rows in enumerate(choices):
            self.tokens += sum(choice.tokens for choice in rows)
            best = sorted(range(len(rows)), key=lambda r: -rows[r].likelihood)
            kept = best[: self.n] if len(rows) > self.n else range(self.n)
            for row in kept:
                entry = self.choice(i, rows[row], running.tickets[i])
                shown.append({"index": len(shown), **entry})
        return {
            **self.head(self.kind), "choices": shown, "usage": self.usage(running),
        }  # fmt: skip

    def usage(self, running: Running) -> dict[str, Any]:
        """Return the counts; tokens of discarded candidates are among them."""
        prompt = sum(len(ids) for ids in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": running.cached_tokens},
        }

    def opening(self, running: Running) -> list[dict[str, Any]]:
        """Return the choices of what is streamed first."""
        raise NotImplementedError

    def delta(self, i: int, piece: Piece, running: Running) -> list[dict[str, Any]]:
        """Return the choices of the chunks that a piece makes."""
        raise NotImplementedError

    def choice(self, i: int, choice: Choice, ticket: Ticket) -> dict[str, Any]:
        """Return one choice of ``whole``, less its index."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """The answer of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    asked: CompletionRequest

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._offsets: dict[int, int] = {}
        self._echoed: set[int] = set()

    def choice(self, i: int, choice: Choice, ticket: Ticket) -> dict[str, Any]:
        text, tokens, first = choice.text, choice.logprobs, None
        if self.asked.echo:
            text = self.texts[i] + text
            prompt, first = self._prompt_logprobs(i, ticket)
            tokens = [*prompt, *tokens]
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = completion_logprobs(self.server.tokenizer, tokens, 0, first=first)
        return {"text": text, "finish_reason": finish_reason(choice.reason), "logprobs": logprobs}

    def opening(self, running: Running) -> list[dict[str, Any]]:
        return []

    def delta(self, i: int, piece: Piece, running: Running) -> list[dict[str, Any]]:
        index = i * self.n + piece.row
        text, tokens, first = piece.text, piece.logprobs, None
        if self.asked.echo and index not in self._echoed:
            self._echoed.add(index)
            text = self.texts[i] + text
            prompt, first = self._prompt_logprobs(i, running.tickets[i])
            tokens = [*prompt, *tokens]
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        if not text and piece.finish_reason is None and not tokens:
            return []
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = completion_logprobs(self.server.tokenizer, tokens, offset, first=first)
        reason = finish_reason(piece.finish_reason)
        return [{"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}]

    def _prompt_logprobs(self, i: int, ticket: Ticket) -> tuple[list[TokenLogprob], int | None]:
        """Return those of the echoed text, and its first token where nothing comes before it."""
        if self.asked.logprobs is None or ticket.job is None:
            return [], None
        # A text is read after the separator, which is no part of it; given tokens are all shown.
        is_text = isinstance(self.asked.prompts[i], str)
        return ticket.job.prompt_logprobs, None if is_text else self.prompts[i][0]


class ChatAnswer(Answer):
    """The answer of ``/v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"
    asked: ChatRequest

    def choice(self, i: int, choice: Choice, ticket: Ticket) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "finish_reason": finish_reason(choice.reason),
            "logprobs": self._logprobs(choice.logprobs),
        }

    def opening(self, running: Running) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [
            {"index": i, "delta": role, "finish_reason": None, "logprobs": None}
            for i in range(self.n)
        ]

    def delta(self, i: int, piece: Piece, running: Running) -> list[dict[str, Any]]:
        chunks = []
        if piece.text or piece.logprobs:
            content = {"content": piece.text}
            logprobs = self._logprobs(piece.logprobs)
            chunks.append({"delta": content, "finish_reason": None, "logprobs": logprobs})
        if piece.finish_reason is not None:
            reason = finish_reason(piece.finish_reason)
            chunks.append({"delta": {}, "finish_reason": reason, "logprobs": None})
        return [{"index": piece.row, **chunk} for chunk in chunks]

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(self.server.tokenizer, tokens) if self.asked.logprobs else None


class EventStream(Response):
    """An answer as server-sent events, ended when the client goes or time is up."""

    media_type = "text/event-stream"

    def __init__(self, server: Server, running: Running, answer: Answer) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._server = server
        self._running = running
        self._answer = answer
        self._began = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        gone = asyncio.create_task(left())
        writing = asyncio.create_task(self._write(send))
        try:
            # A client that does not read is as gone as one that has left.
            await asyncio.wait(
                {gone, writing},
                timeout=self._server.config.request_timeout + LAST_WORDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if writing.done():
                writing.result()
        except OSError:
            pass  # the connection broke while being written to
        finally:
            self._running.cancel()
            for task in (gone, writing):
                task.cancel()
            self._server.duration.observe(time.perf_counter() - self._began)

    async def _write(self, send: Send) -> None:
        async def give(events: list[str], *, more: bool = True) -> None:
            body = "".join([f"data: {event}\n\n" for event in events]).encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        answer, running = self._answer, self._running
        head = answer.head(answer.chunk_kind)
        if answer.include_usage:
            head["usage"] = None
        # What all events begin with is written once.
        start = _json(head).removesuffix("}") + ', "choices": ['

        def events(choices: list[dict[str, Any]]) -> list[str]:
            return [f"{start}{_json(choice)}]}}" for choice in choices]

        last: list[str] = []
        try:
            async with asyncio.timeout(self._server.config.request_timeout):
                if opening := events(answer.opening(running)):
                    await give(opening)
                left = running.rows
                async for i, piece in running.pieces():
                    answer.tokens += piece.tokens
                    left -= piece.finish_reason is not None
                    last = events(answer.delta(i, piece, running))
                    # What comes last goes out with the end.
                    if last and left:
                        await give(last)
            if answer.include_usage:
                last.append(_json({**head, "choices": [], "usage": answer.usage(running)}))
            last.append("[DONE]")
        except ApiError as error:
            last = [_json(error.body)]
        except TimeoutError:
            last = [_json(timed_out().body)]
        await give(last, more=False)


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def _json(value: object) -> str:
    return _ENCODER.encode(value)


def busy(status: int, message: str) -> ApiError:
    """Return the answer to a request that there is no room for."""
    return ApiError(
        status, message, kind="server_error" if status == 503 else "rate_limit_error",
        code="server_busy", retry_after=_RETRY_AFTER,
    )  # fmt: skip


def timed_out() -> ApiError:
    """Return the answer to one that took too long."""
    return ApiError(504, "The request took too long.", kind="server_error", code="timeout")


def internal() -> ApiError:
    """Return the answer where the mistake is ours."""
    return ApiError(500, "The server made a mistake.", kind="server_error")


def explained(error: Exception) -> ApiError:
    """Return the answer for a request that the engine or the worker did not take to its end."""
    if isinstance(error, SessionBusyError):
        return ApiError(409, "session: its last turn has not ended.", param="session")
    if isinstance(error, SessionGoneError):
        return ApiError(
            410,
            "session: its state was given up for others'; begin a new one, or end it with "
            "DELETE /v1/sessions/ID to use the name again.",
            param="session",
            code="session_gone",
        )
    if isinstance(error, ConfigError):
        return ApiError(400, f"{error.key}: {error.remedy}", param=error.key)
    return internal()

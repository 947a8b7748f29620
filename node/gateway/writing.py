"""Writes one request's answers side by side and sends them in one stream or one reply.

The answers end when their client disconnects.
"""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import trio
from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from dsd_p2p.errors import DsdError, PeerTimeout, first_cause
from node.gateway.admission import Admission
from node.gateway.choice import Choice, Piece
from node.gateway.errors import ApiError, api_error, json_response, unexpected
from node.gateway.keys import Client
from node.gateway.replies import PromptTokensDetails, Usage, audited_of, speculation_of

logger = logging.getLogger(__name__)

_QUEUED_PIECES = 64
_LEFT = 499
"""The status that metrics count when the client left before its answer was complete."""

_FIRST_BEAT_S, _BEAT_S = 1.0, 10.0

Event = dict[str, Any]
"""An event of a stream whose events have names; the name is its "type"."""


class Format(Protocol):
    """The format in which an endpoint sends answers. One object serves one request.

    prefix: of the ids of its replies. done: what ends a stream. beat: what is sent while nothing arrives, if anything.
    """

    prefix: str
    content_type: str
    beat: bytes
    done: bytes

    def framed(self, event: object) -> bytes:
        """Return an event of a stream as it is sent."""
        ...

    def whole(self, head: "Head", choices: Sequence[tuple[Choice, list[Piece]]], usage: Usage) -> object:
        """Return the whole reply."""
        ...

    def first(self, head: "Head", index: int) -> Sequence[object]:
        """Return the first events of an answer."""
        ...

    def event(self, head: "Head", index: int, piece: Piece) -> Sequence[object]:
        """Return the events with the next part of an answer."""
        ...

    def last(self, head: "Head", index: int, choice: Choice) -> Sequence[object]:
        """Return the last events of an answer."""
        ...

    def end(self, head: "Head", choices: Sequence[Choice], usage: Usage, *, with_usage: bool) -> Sequence[object]:
        """Return the events after the last answer. with_usage: whether the client wants the token counts."""
        ...

    def error(self, error: ApiError) -> object:
        """Return an error as the whole reply."""
        ...

    def failed(self, error: ApiError) -> object:
        """Return an error as the last event of a stream."""
        ...


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that every reply begins with."""

    id: str
    created: int
    model: str
    fingerprint: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingOptions:
    """How a request's answers are sent.

    is_stream: whether to send server-sent events. deadline_s: the time limit for all answers together.
    is_audited: whether to tell what was checked. headers: further headers of the reply.
    """

    model: str
    fingerprint: str
    is_stream: bool
    with_usage: bool
    deadline_s: float
    is_audited: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


Noted = Callable[["Writing", int], None]
"""Called with an answered request and its status when it has ended."""


class Writing:
    """A Starlette response with the answers to one request.

    num_prompt_tokens: tokens of all prompts. note: called with the status when the request has ended.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        form: Format,
        options: WritingOptions,
        *,
        client: Client,
        admission: Admission,
        num_prompt_tokens: int,
        note: "Noted",
    ) -> None:
        self.choices = choices
        self._form = form
        self._client = client
        self._admission = admission
        self._options = options
        self._head = Head(
            id=f"{form.prefix}{secrets.token_hex(12)}",
            created=int(time.time()),
            model=options.model,
            fingerprint=options.fingerprint,
            num_prompt_tokens=num_prompt_tokens,
        )
        self.num_prompt_tokens = num_prompt_tokens
        self._note = note
        self._is_started = False
        self._status = _LEFT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response over ASGI."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_disconnect, receive, nursery.cancel_scope)
                await self._answer(scope, receive, send)
                nursery.cancel_scope.cancel()
        finally:
            self._note(self, self._status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with trio.fail_after(self._options.deadline_s):
                await (self._stream(send) if self._options.is_stream else self._whole(scope, receive, send))
        except Exception as exc:  # task boundary: report any failure of an answer to its client
            error = self._explain(exc)
            self._status = error.status
            if not self._is_started:
                await json_response(self._form.error(error), error.status, error.headers)(scope, receive, send)
            else:
                await self._send_events(send, [self._form.failed(error)])
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _explain(self, exc: BaseException) -> ApiError:
        match first_cause(exc):
            case DsdError() as cause:
                return api_error(cause)
            case trio.TooSlowError():
                return api_error(PeerTimeout(f"the answer took longer than {self._options.deadline_s:g} s"))
            case cause:
                logger.error("answer failed", exc_info=cause)
                return unexpected()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in self.choices]
        async with self._pieces() as arriving:
            async for index, piece in arriving:
                if piece is not None:
                    pieces[index].append(piece)
        reply = self._form.whole(self._head, list(zip(self.choices, pieces, strict=True)), self._usage())
        self._status = 200
        headers = {**self._client.headers(), **self._options.headers}
        await json_response(reply, headers=headers)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        begun: set[int] = set()
        async with self._pieces() as arriving:
            async for index, piece in self._with_beats(arriving, send):
                if not self._is_started:
                    await self._start(send)
                if index not in begun:
                    begun.add(index)
                    await self._send_events(send, self._form.first(self._head, index))
                if piece is not None:
                    await self._send_events(send, self._form.event(self._head, index, piece))
                else:
                    await self._send_events(send, self._form.last(self._head, index, self.choices[index]))
        ends = self._form.end(self._head, self.choices, self._usage(), with_usage=self._options.with_usage)
        await self._send_events(send, ends)
        self._status = 200
        await send({"type": "http.response.body", "body": self._form.done, "more_body": False})

    async def _with_beats(
        self, arriving: trio.MemoryReceiveChannel[tuple[int, Piece | None]], send: Send
    ) -> AsyncIterator[tuple[int, Piece | None]]:
        """Yield what arrives. While nothing does, send the headers and then comments, so that no proxy gives up.

        The headers wait for a moment, because an error that comes at once has a status of its own.
        """
        while True:
            with trio.move_on_after(_BEAT_S if self._is_started else _FIRST_BEAT_S) as waiting:
                try:
                    item = await arriving.receive()
                except trio.EndOfChannel:
                    return
            if waiting.cancelled_caught:
                if not self._is_started:
                    await self._start(send)
                await send({"type": "http.response.body", "body": self._form.beat, "more_body": True})
            else:
                yield item

    async def _start(self, send: Send) -> None:
        self._is_started = True
        headers = {
            "content-type": self._form.content_type,
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            **self._client.headers(),
            **self._options.headers,
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _send_events(self, send: Send, events: Sequence[object]) -> None:
        body = b"".join(self._form.framed(event) for event in events)
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})

    @asynccontextmanager
    async def _pieces(self) -> AsyncIterator[trio.MemoryReceiveChannel[tuple[int, Piece | None]]]:
        """Yield a channel with every answer's pieces and its number, as they arrive. None ends an answer."""
        put, take = trio.open_memory_channel[tuple[int, Piece | None]](_QUEUED_PIECES)
        async with trio.open_nursery() as nursery, take:
            async with put:
                for index in range(len(self.choices)):
                    nursery.start_soon(self._write, index, put.clone())
            yield take

    async def _write(self, index: int, put: trio.MemorySendChannel[tuple[int, Piece | None]]) -> None:
        choice = self.choices[index]
        num_counted = 0
        async with put, self._admission.enter(self._client.name), aclosing(choice.pieces()) as pieces:
            async for piece in pieces:
                self._client.spend(choice.num_tokens - num_counted)
                num_counted = choice.num_tokens
                await put.send((index, piece))
            await put.send((index, None))

    @property
    def num_cached_tokens(self) -> int:
        """The prompt tokens that the stages still held, as far as known. A prompt with several answers counts once."""
        cached: dict[int, int] = {}
        for choice in self.choices:
            prompt = id(choice.prompt)
            cached[prompt] = max(cached.get(prompt, 0), choice.outcome.num_cached_tokens)
        return sum(cached.values())

    def _usage(self) -> Usage:
        num_tokens = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=self.num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens),
            speculation=[speculation_of(choice.outcome.statistics) for choice in self.choices],
            audit=[audited_of(choice.outcome.statistics) for choice in self.choices]
            if self._options.is_audited
            else UNSET,
        )


async def watch_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel `scope` when the client disconnects, so that the stages are freed."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()

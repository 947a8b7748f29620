"""One stage: takes windows in, runs its span over them, hands them on; at the tail, answers with verdicts.

Each session is one task with its own bounded queue; the model is used by one of them at a time, first come first served.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
import trio

from dsd_p2p.errors import (
    CapacityError,
    ConfigError,
    DsdError,
    ModelError,
    PeerDisconnected,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
)
from dsd_p2p.pipeline.links import Arrived, PeerLinks
from dsd_p2p.session.slots import CacheEdit, Forward
from dsd_p2p.session.stage import StageState
from dsd_p2p.session.tail import TailWalk, verdict_of
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import PeerId, Span, TokenId
from dsd_p2p.verification.adaptive import AdaptiveVerifier
from dsd_p2p.verification.base import TargetView, Verifier
from dsd_p2p.verification.exact import ExactVerifier
from dsd_p2p.verification.importance import DraftOpinion
from dsd_p2p.wire.hidden import HiddenFormat, pack, packed_row_bytes, unpack
from dsd_p2p.wire.messages import (
    MAX_STAGES,
    Cancel,
    CloseSession,
    DraftTop,
    Failure,
    FailureKind,
    Hop,
    OpenSession,
    Verdict,
    Window,
)

logger = logging.getLogger(__name__)

_MAX_CLOSED_REMEMBERED = 1024
_CONNECT_TIMEOUT_S = 10.0


class SpanCache(Protocol):
    """The keys and values of one session at one stage."""

    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots."""
        ...

    def free(self) -> None:
        """Give the memory back to the budget; twice is harmless."""
        ...


class SpanModel(Protocol):
    """The layers of one span, as a stage uses them (`dsd_p2p.models.span`, and fakes that compute nothing)."""

    @property
    def is_head(self) -> bool:
        """True when the span starts with the embedding."""
        ...

    @property
    def is_tail(self) -> bool:
        """True when the span ends with the norm and the LM head."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one node's hidden state."""
        ...

    def new_cache(self, max_slots: int) -> SpanCache:
        """Return an empty cache for up to `max_slots`.

        Raises:
            CapacityError: the memory budget is full.
        """
        ...

    def hidden(self, cache: Any, forward: Forward, inputs: Sequence[TokenId] | bytes) -> bytes:
        """Hidden states `[n, H]` after the span; `inputs` are token ids at the head, else hidden states.

        Raises:
            RemoteProtocolError: wrong number of bytes, a token outside the vocabulary, values that are not finite.
        """
        ...

    def views(
        self, cache: Any, forward: Forward, inputs: Sequence[TokenId] | bytes, rows: Sequence[int]
    ) -> Sequence[TargetView]:
        """At the tail: the target's view after each of `rows`. Raises as `hidden` does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What one stage grants.

    max_sessions: open at the same time. max_queued_windows, max_queued_bytes: of one session, waiting for the model.
    max_draft_slots: cache slots of one session beyond its longest text, and its most speculative nodes.
    """

    max_sessions: int = 64
    max_queued_windows: int = 512
    max_queued_bytes: int = 256 << 20
    max_draft_slots: int = 1024


@dataclass(slots=True, kw_only=True, eq=False)
class _Session:
    opened: OpenSession
    previous: PeerId
    onward: Hop | None
    state: StageState
    walk: TailWalk | None
    verifier: Verifier
    read_format: HiddenFormat
    write_format: HiddenFormat
    row_bytes: int
    max_slots: int
    replaces: "_Session | None"
    put: trio.MemorySendChannel[tuple[Window, bytes]]
    take: trio.MemoryReceiveChannel[tuple[Window, bytes]]
    cache: SpanCache | None = None
    received_bytes: int = 0
    queued_bytes: int = 0
    is_over: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    error: DsdError | None = None

    @property
    def coordinator(self) -> PeerId:
        return PeerId(self.opened.coordinator.peer)

    def end(self, error: DsdError | None = None) -> None:
        self.error = self.error or error
        self.scope.cancel()


class StageServer:
    """Serves one span to whoever opens sessions on it. `run` until cancelled."""

    def __init__(self, links: PeerLinks, model: SpanModel, limits: StageLimits, clock: Callable[[], float]) -> None:
        if links.me.span is None:
            raise ModelError("a stage server needs a span")
        self._links = links
        self._me = links.me
        self._span: Span = links.me.span
        self._model = model
        self._limits = limits
        self._clock = clock
        self._model_in_use = trio.Lock()
        self._sessions: dict[bytes, _Session] = {}
        self._closed: OrderedDict[tuple[str, bytes], int] = OrderedDict()

    @property
    def num_sessions(self) -> int:
        """Sessions that hold cache right now."""
        return len(self._sessions)

    async def run(self) -> None:
        """Serve until cancelled; every cache is free afterwards."""
        async with trio.open_nursery() as nursery:
            while True:
                event = await self._links.receive()
                if isinstance(event, Lost):
                    self._lost(event)
                    continue
                try:
                    await self._dispatch(event, nursery)
                except RemoteProtocolError as exc:
                    await self._links.refuse(event.sender, exc)

    # What arrives

    async def _dispatch(self, event: Arrived, nursery: trio.Nursery) -> None:
        match event.message:
            case OpenSession() as opened:
                index = self._check_sender(opened, event.sender)
                try:
                    session = self._accept(opened, index)
                except (CapacityError, ConfigError, ModelError, RemoteProtocolError) as exc:
                    nursery.start_soon(self._report, opened, exc)
                    return
                if session is not None:
                    nursery.start_soon(self._serve, session)
            case Window() as window:
                self._enqueue(window, event)
            case Cancel(session=name, epoch=epoch):
                if (owned := self._owned(name, event.sender)) is not None:
                    owned.state.cancel(epoch)
            case CloseSession(session=name, epoch=epoch):
                if (owned := self._owned(name, event.sender)) is not None and epoch >= owned.opened.epoch:
                    owned.end()
                self._remember_closed(event.sender, name, epoch)
            case Failure() as failure:
                logger.warning("peer reports peer=%s kind=%s text=%s", event.sender, failure.kind, failure.text)
            case other:
                raise RemoteProtocolError("message", type(other).__name__, "one that a stage takes")

    def _accept(self, opened: OpenSession, index: int) -> _Session | None:
        """Check an `OpenSession` and reserve what it needs; None when the coordinator closed it already."""
        if opened.epoch <= self._closed.get((opened.coordinator.peer, opened.session), -1):
            return None
        self._check_route(opened, index)
        if opened.model_digest != self._me.model_digest or opened.dtype != self._me.dtype:
            raise ModelError(
                f"this stage holds {self._me.model_name} {self._me.model_digest[:12]} {self._me.dtype}, asked for "
                f"{opened.model_digest[:12]} {opened.dtype}: start all stages with the same model"
            )
        if opened.max_length > self._me.max_positions:
            raise CapacityError(
                f"{opened.max_length} tokens exceed the model's {self._me.max_positions}: ask for fewer"
            )
        old = self._sessions.get(opened.session)
        if old is not None:
            if old.coordinator != opened.coordinator.peer or opened.epoch <= old.opened.epoch:
                raise RemoteProtocolError("epoch", opened.epoch, f"above {old.opened.epoch}, from the same coordinator")
            old.end()
        elif len(self._sessions) >= self._limits.max_sessions:
            raise CapacityError(f"{self._limits.max_sessions} sessions are open here: try again later")
        max_slots = opened.max_length + self._limits.max_draft_slots
        is_tail = index == len(opened.route) - 1
        read_format = opened.formats[index - 1] if opened.formats and index else HiddenFormat.MODEL
        put, take = trio.open_memory_channel[tuple[Window, bytes]](self._limits.max_queued_windows)
        session = _Session(
            opened=opened,
            previous=_previous(opened, index),
            onward=None if is_tail else opened.route[index + 1],
            state=StageState(
                epoch=opened.epoch, max_length=opened.max_length, max_speculative=self._limits.max_draft_slots
            ),
            walk=TailWalk(epoch=opened.epoch, num_given=opened.num_given) if is_tail else None,
            verifier=_verifier(opened),
            read_format=read_format,
            write_format=opened.formats[index] if opened.formats and not is_tail else HiddenFormat.MODEL,
            row_bytes=packed_row_bytes(self._model.row_bytes, opened.dtype, read_format),
            max_slots=max_slots,
            replaces=old,
            put=put,
            take=take,
        )
        self._sessions[opened.session] = session
        return session

    def _check_sender(self, opened: OpenSession, sender: PeerId) -> int:
        """Return this stage's index in the route; whoever sends it must stand before us there."""
        mine = [index for index, hop in enumerate(opened.route) if hop.peer == self._me.peer]
        if len(mine) != 1:
            raise RemoteProtocolError("route", [hop.peer for hop in opened.route], f"{self._me.peer} exactly once")
        if sender != _previous(opened, mine[0]):
            raise RemoteProtocolError("sender", sender, f"{_previous(opened, mine[0])}, the stage before in the route")
        return mine[0]

    def _check_route(self, opened: OpenSession, index: int) -> None:
        route, me = opened.route, self._me
        if len({opened.coordinator.peer, *(hop.peer for hop in route)}) != len(route) + 1:
            raise RemoteProtocolError("route", [hop.peer for hop in route], "each peer once, without the coordinator")
        if route[index].span != self._span:
            raise RemoteProtocolError("span", str(route[index].span), f"this stage's {self._span}")
        bounds = [0, *(hop.span.last for hop in route)]
        if [hop.span.first for hop in route] != bounds[:-1] or bounds[-1] != me.num_layers:
            raise RemoteProtocolError("route spans", [str(hop.span) for hop in route], f"layers 0..{me.num_layers}")

    def _enqueue(self, window: Window, event: Arrived) -> None:
        session = self._sessions.get(window.session)
        if session is None or session.state.is_stale(window):
            return
        if event.sender != session.previous:
            raise RemoteProtocolError("sender", event.sender, f"{session.previous}, the stage before in the route")
        if self._model.is_head and (window.stage_us or window.link_bytes):
            raise RemoteProtocolError(
                "stage_us, link_bytes", (window.stage_us, window.link_bytes), "none before the head"
            )
        expected_bytes = 0 if self._model.is_head else len(window.tokens) * session.row_bytes
        if len(event.payload) != expected_bytes:
            raise RemoteProtocolError("payload length", len(event.payload), f"{expected_bytes} bytes")
        session.received_bytes += event.num_bytes
        session.queued_bytes += expected_bytes
        if session.queued_bytes > self._limits.max_queued_bytes:
            session.end(CapacityError(f"{session.queued_bytes} bytes of windows wait here: send them more slowly"))
            return
        try:
            session.put.send_nowait((window, bytes(event.payload)))
        except trio.WouldBlock:
            session.end(CapacityError(f"{self._limits.max_queued_windows} windows wait here: send them more slowly"))
        except trio.BrokenResourceError:
            pass

    def _lost(self, event: Lost) -> None:
        for session in list(self._sessions.values()):
            if event.peer == session.coordinator:
                session.end()
            elif event.peer == session.previous or (session.onward and event.peer == session.onward.peer):
                session.end(PeerDisconnected(f"stage {self._span} lost its neighbour {event.peer}: {event.reason}"))

    def _owned(self, name: bytes, sender: PeerId) -> _Session | None:
        session = self._sessions.get(name)
        if session is None:
            return None
        if sender != session.coordinator:
            raise RemoteProtocolError("sender", sender, f"{session.coordinator}, the session's coordinator")
        return session

    # One session

    async def _serve(self, session: _Session) -> None:
        """Handle the session's windows in order until it ends; tells the coordinator when that is our doing."""
        logger.info("session opened session=%s span=%s", session.opened.session.hex(), self._span)
        try:
            with session.scope, session.take:
                if session.replaces is not None:
                    # Its last pass may still run in its thread; only then is its cache free.
                    await session.replaces.is_over.wait()
                    session.replaces = None
                session.cache = self._model.new_cache(session.max_slots)
                await self._open_onward(session)
                while True:
                    with trio.fail_after(session.opened.idle_timeout_s):
                        window, payload = await session.take.receive()
                    session.queued_bytes -= len(payload)
                    await self._handle(session, window, payload)
        except trio.TooSlowError:
            session.error = PeerTimeout(f"stage {self._span} heard nothing for {session.opened.idle_timeout_s:g} s")
        except DsdError as exc:
            session.error = exc
        except Exception as exc:  # task boundary: one session's failed pass must not end the others
            logger.exception("pass failed session=%s", session.opened.session.hex())
            session.error = ModelError(f"stage {self._span} failed: {type(exc).__name__}; see its log")
        finally:
            if session.cache is not None:
                session.cache.free()
            session.is_over.set()
            if self._sessions.get(session.opened.session) is session:
                del self._sessions[session.opened.session]
            logger.info("session closed session=%s error=%s", session.opened.session.hex(), session.error)
        if session.error is not None:
            self._remember_closed(session.coordinator, session.opened.session, session.opened.epoch)
            await self._report(session.opened, session.error)

    async def _open_onward(self, session: _Session) -> None:
        onward = session.onward
        if onward is not None:
            if onward.peer not in self._links.connected:
                await self._links.connect(onward.address, _CONNECT_TIMEOUT_S)
            await self._links.send(PeerId(onward.peer), session.opened)
        elif session.coordinator not in self._links.connected:
            await self._links.connect(session.opened.coordinator.address, _CONNECT_TIMEOUT_S)

    async def _handle(self, session: _Session, window: Window, payload: bytes) -> None:
        async with self._model_in_use:
            if session.state.is_stale(window):
                return
            # Not abandoned on cancellation: the cache must not be freed under a running pass.
            answer = await trio.to_thread.run_sync(self._run, session, window, payload)
        if answer is not None:
            to = session.coordinator if session.onward is None else PeerId(session.onward.peer)
            await self._links.send(to, *answer)

    def _run(self, session: _Session, window: Window, payload: bytes) -> tuple[Window | Verdict, bytes] | None:
        """In a worker thread: edit the cache, run the span, walk at the tail; returns what to send on."""
        start_s = self._clock()
        num_nodes = len(window.tokens)
        live = session.walk.live(window) if session.walk else list(range(num_nodes))
        step = session.state.accept(window, live)
        if step is None:
            return None
        assert session.cache is not None
        if step.edit is not None:
            session.cache.edit(step.edit)
        inputs = self._inputs(session, window, payload, live)
        if session.walk is None:
            assert step.forward is not None, "only the tail skips nodes"
            hidden = self._model.hidden(session.cache, step.forward, inputs)
            packed = pack(hidden, self._model.row_bytes, session.opened.dtype, session.write_format)
            return _measured(window, session, self._clock() - start_s), packed
        if step.forward is None:
            return None
        wanted = [row for row, offset in enumerate(live) if session.walk.wants_pick(window.positions[offset])]
        views = dict(zip(wanted, self._model.views(session.cache, step.forward, inputs, wanted), strict=True))

        tops = {top.offset: top for top in window.drafts} if session.opened.relaxation else {}
        num_relaxed = 0

        def pick(row: int) -> TokenId:
            nonlocal num_relaxed
            top = tops.get(live[row])
            token, is_relaxed = session.verifier.judge(
                views[row], window.positions[live[row]] + 1, _opinion(top) if top else None
            )
            num_relaxed += is_relaxed
            return token

        committed = session.walk.walk(window, live, pick)
        if not committed.tokens:
            return None
        measured = _measured(window, session, self._clock() - start_s)
        return verdict_of(measured, committed, num_live=len(live), num_relaxed=num_relaxed), b""

    def _inputs(self, session: _Session, window: Window, payload: bytes, live: list[int]) -> list[TokenId] | bytes:
        if self._model.is_head:
            return [window.tokens[offset] for offset in live]
        if len(live) < len(window.tokens):
            row_bytes = session.row_bytes
            payload = b"".join(payload[offset * row_bytes : (offset + 1) * row_bytes] for offset in live)
        return unpack(payload, self._model.row_bytes, session.opened.dtype, session.read_format)

    def _remember_closed(self, coordinator: str, name: bytes, epoch: int) -> None:
        """A close can overtake the open that travels down the chain: an `OpenSession` up to this epoch is ignored."""
        key = (coordinator, name)
        self._closed[key] = max(epoch, self._closed.get(key, -1))
        self._closed.move_to_end(key)
        while len(self._closed) > _MAX_CLOSED_REMEMBERED:
            self._closed.popitem(last=False)

    async def _report(self, opened: OpenSession, error: DsdError) -> None:
        logger.warning("session failed session=%s error=%s", opened.session.hex(), error)
        failure = Failure(session=opened.session, epoch=opened.epoch, kind=_kind(error), text=str(error)[:512])
        with suppress(PeerError), trio.move_on_after(_CONNECT_TIMEOUT_S):
            await self._links.send(PeerId(opened.coordinator.peer), failure)


def _previous(opened: OpenSession, index: int) -> PeerId:
    return PeerId(opened.route[index - 1].peer if index else opened.coordinator.peer)


def _verifier(opened: OpenSession) -> Verifier:
    if opened.relaxation is None:
        return ExactVerifier(opened.sampling)
    return AdaptiveVerifier(opened.sampling, opened.relaxation)


def _opinion(top: DraftTop) -> DraftOpinion:
    return DraftOpinion(tokens=np.array(top.tokens, np.int64), logprobs=np.array(top.centinats, np.float64) / -100)


def _measured(window: Window, session: _Session, seconds: float) -> Window:
    """The window with what this stage adds to its measurements."""
    return msgspec.structs.replace(
        window,
        stage_us=(*window.stage_us, max(0, round(seconds * 1e6)))[-MAX_STAGES:],
        link_bytes=min(window.link_bytes + session.received_bytes, 1 << 62),
    )


def _kind(error: DsdError) -> FailureKind:
    match error:
        case CapacityError():
            return FailureKind.CAPACITY
        case RemoteProtocolError():
            return FailureKind.PROTOCOL
        case PeerTimeout():
            return FailureKind.TIMEOUT
        case PeerError():
            return FailureKind.ROUTE
        case _:
            return FailureKind.MODEL

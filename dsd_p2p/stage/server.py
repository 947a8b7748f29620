"""Serves one stage: receives windows, runs its span over them, and sends them on; the tail sends verdicts instead.

How it works. `StageServer` is a service (`dsd_p2p.peers.services`). It asks `.admission` whether to accept each
message, and passes it to its session. Each session is one task (`.task`) with a bounded inbox. `.batcher` runs the
windows of all sessions together in a worker thread. `.parking` holds the texts of closed sessions. `.recompute` answers
spot checks. `.session` describes the phases of a session and which thread may use which of its fields.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

import trio

from dsd_p2p.errors import (
    CapacityError,
    ConfigError,
    ModelError,
    PeerDisconnected,
    PeerError,
    PeerLeaving,
    RemoteProtocolError,
)
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.services import Handler
from dsd_p2p.session.stage import StageState
from dsd_p2p.session.tail import TailWalk
from dsd_p2p.stage.admission import (
    ClosedSessions,
    StageLimits,
    check_opening,
    check_reveal,
    index_in_route,
    is_window_wanted,
    replaced_session,
)
from dsd_p2p.stage.batcher import Batcher, PassCosts
from dsd_p2p.stage.parking import Parking
from dsd_p2p.stage.recompute import Recomputer
from dsd_p2p.stage.session import Held, Inbox, Place, Queued, StageSession, Tail
from dsd_p2p.stage.span_model import SpanModel
from dsd_p2p.stage.task import SessionTasks
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import PeerId, Span, short_peer
from dsd_p2p.verification.choice import choose_verifier
from dsd_p2p.wire.messages import (
    BASE,
    Cancel,
    CloseSession,
    Message,
    OpenSession,
    Recompute,
    Recomputed,
    Reveal,
    Revealed,
    Window,
)
from dsd_p2p.wire.opening import signed_opening

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 10.0


class StageServer:
    """A stage that serves a span, or no layers yet, to the coordinators that open sessions on it.

    sign: signs with the peer's own key, for sessions that ask for attestations.
    """

    def __init__(
        self,
        links: PeerLinks,
        model: SpanModel | None,
        limits: StageLimits,
        clock: Callable[[], float],
        sign: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.links = links
        self._model = model
        # The parts of the span that routes have asked for.
        self._parts: dict[Span, SpanModel] = {}
        self._limits = limits
        self._clock = clock
        self._costs = PassCosts()
        model_in_use = trio.Lock()
        self.work = Batcher(model_in_use, clock, self._costs.note)
        self.parking = Parking(model_in_use, limits.max_parked, limits.parked_s)
        self._recomputer = Recomputer(links, self.work, self.parking.texts.evict)
        self._tasks = SessionTasks(links, self.work, self.parking, limits, sign)
        self._closed = ClosedSessions()
        self._nursery: trio.Nursery | None = None
        self._is_draining = False

    def __repr__(self) -> str:
        sessions = ", ".join(map(repr, self.sessions.values())) or "no sessions"
        return f"<stage {short_peer(self.links.me.peer)} layers {self.links.me.span}: {sessions}>"

    @property
    def sessions(self) -> Mapping[bytes, StageSession]:
        """The open sessions, by name."""
        return self._tasks.sessions

    @property
    def num_sessions(self) -> int:
        """The number of open sessions."""
        return len(self.sessions)

    @property
    def parked_bytes(self) -> int:
        """The cache that parked texts take until a session needs it, in bytes."""
        return self.parking.texts.num_bytes

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler for each type of message that a stage accepts."""
        return {
            OpenSession: self._open,
            Window: self._take_window,
            Cancel: self._cancel,
            CloseSession: self._close,
            Reveal: self._reveal,
            Recompute: self._recompute,
        }

    def start(self, nursery: trio.Nursery) -> None:
        """Serve until the nursery closes. Every cache is free afterwards."""
        self._nursery = nursery
        self._tasks.start(nursery)
        self.parking.start(nursery)
        nursery.start_soon(self.work.serve)

    async def serve_span(self, model: SpanModel | None) -> None:
        """End all sessions, then serve `model`. The caller has updated `links.me` to describe it."""
        sessions = list(self.sessions.values())
        for session in sessions:
            session.end(PeerDisconnected("this stage changes to other layers: use another route"))
        for session in sessions:
            await session.is_over.wait()
        self.parking.texts.clear()
        self._model = model
        self._parts = {}

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions, wait up to `timeout_s` for the open ones to end, then end the rest."""
        self._is_draining = True
        with trio.move_on_after(timeout_s):
            for session in list(self.sessions.values()):
                await session.is_over.wait()
        for session in list(self.sessions.values()):
            session.end(PeerLeaving("this stage is shutting down"))
        self.parking.texts.clear()

    def measured_layer_s(self) -> tuple[float, float] | None:
        """Return the measured seconds of a layer's pass over 1 and over 16 positions; None until enough were run."""
        return self._costs.layer_s()

    # Messages

    async def _open(self, event: Arrived, opened: OpenSession) -> None:
        assert self._nursery is not None, "start first"
        index = index_in_route(opened, self.links.me.peer, event.sender)
        coordinator = PeerId(opened.coordinator.peer)
        if not self.links.transport.is_signed(coordinator, opened.signature, signed_opening(opened)):
            raise RemoteProtocolError("opening signature", opened.signature.hex()[:12], f"that of {coordinator}")
        if self._closed.is_closed(opened):
            return
        try:
            session = self._admit(opened, index)
        except (CapacityError, ConfigError, ModelError, PeerError) as exc:
            self._nursery.start_soon(self._tasks.report, opened, exc)
            return
        self._nursery.start_soon(self._tasks.run, session, self._forget)

    def _admit(self, opened: OpenSession, index: int) -> StageSession:
        """Check an opening and register its session, which replaces an open one of the same name."""
        check_opening(opened, index, self.links.me)
        model = self._part(opened.route[index].span)
        # Every stage refuses a request that the tail could not verify.
        verifier = choose_verifier(opened.text, model.grammars)
        old = replaced_session(
            opened, index, self.sessions, self._limits.sessions, self.links.root_of, is_draining=self._is_draining
        )
        place = Place(opened=opened, index=index, model=model)
        num_parked = opened.prefix.num_tokens if opened.prefix else 0
        state = StageState(
            epoch=opened.epoch,
            max_length=opened.max_length,
            max_speculative=self._limits.max_draft_slots,
            num_held=num_parked,
        )
        num_held = opened.num_given - 1 if place.is_kept else num_parked
        walk = TailWalk(
            epoch=opened.epoch,
            num_prompt=opened.num_prompt,
            num_given=opened.num_given,
            at=num_held - 1 if num_held else BASE,
        )
        session = StageSession(
            place=place,
            held=Held(state=state),
            tail=Tail(walk=walk, verifier=verifier.open(opened.num_prompt)) if place.is_tail else None,
            inbox=Inbox(self._limits.max_queued_windows, self._limits.max_queued_bytes),
            replaces=old,
        )
        # These raise if the model cannot use the formats: refuse now, not in the first pass.
        _ = place.read_row_bytes, place.written_row_bytes
        if old is not None:
            old.has_heir = place.is_kept
            old.end()
        self._tasks.sessions[opened.session] = session
        return session

    def _forget(self, session: StageSession) -> None:
        self._closed.add(session.coordinator, session.opened.session, session.opened.epoch)

    async def _take_window(self, event: Arrived, window: Window) -> None:
        session = self.sessions.get(window.session)
        if session is None:
            self.links.transport.penalise(event.sender)
        elif is_window_wanted(session, event, window):
            try:
                session.inbox.put(Queued(window, bytes(event.payload), self._clock()), event.num_bytes)
            except CapacityError as exc:
                session.end(exc)

    async def _cancel(self, event: Arrived, cancel: Cancel) -> None:
        if (session := self._owned(cancel.session, event.sender)) is not None:
            session.held.state.cancel(cancel.epoch)

    async def _close(self, event: Arrived, close: CloseSession) -> None:
        was_parked = close.park is None and self.parking.texts.discard(event.sender, close.session)
        is_known = close.session in self.sessions or not was_parked
        session = self._owned(close.session, event.sender) if is_known else None
        if session is not None and close.epoch >= session.opened.epoch:
            session.park = None if self._is_draining else close.park
            session.end()
        self._closed.add(event.sender, close.session, close.epoch)

    async def _reveal(self, event: Arrived, reveal: Reveal) -> None:
        assert self._nursery is not None, "start first"
        if (session := self._owned(reveal.session, event.sender)) is not None:
            check_reveal(session, reveal)
            self._nursery.start_soon(self._show, session, reveal)
        else:
            nothing = Revealed(session=reveal.session, start=reveal.start, num_rows=0)
            self._nursery.start_soon(self._answer, event.sender, nothing, b"")

    async def _show(self, session: StageSession, reveal: Reveal) -> None:
        # No pass may move the rows meanwhile.
        async with self.work.model_in_use:
            rows, num_rows = session.held.signed_rows(reveal.start, reveal.end, reveal.at)
        answer = Revealed(session=reveal.session, start=reveal.start, num_rows=num_rows)
        await self._answer(session.coordinator, answer, rows)

    async def _recompute(self, event: Arrived, asked: Recompute) -> None:
        assert self._nursery is not None, "start first"
        try:
            self._recomputer.begin(event.sender)
        except CapacityError as exc:
            self.links.transport.penalise(event.sender)
            busy = Recomputed(request=asked.request, error=str(exc))
            self._nursery.start_soon(self._answer, event.sender, busy, b"")
        else:
            payload = bytes(event.payload)
            self._nursery.start_soon(self._recomputer.answer, self._part, event.sender, asked, payload)

    def _part(self, span: Span) -> SpanModel:
        """Return the part of our layers that a route or a check asks for.

        Raises:
            PeerDisconnected: we hold no layers.
            ConfigError: they are not ours.
        """
        if self._model is None:
            raise PeerDisconnected("this peer holds no layers now: choose another")
        if span not in self._parts:
            self._parts[span] = self._model.narrow(span)
        return self._parts[span]

    async def _answer(self, to: PeerId, message: Message, payload: bytes) -> None:
        with suppress(PeerError), trio.move_on_after(_ANSWER_TIMEOUT_S):
            await self.links.send(to, message, payload)

    def _owned(self, name: bytes, sender: PeerId) -> StageSession | None:
        session = self.sessions.get(name)
        if session is None:
            self.links.transport.penalise(sender)
            return None
        if sender != session.coordinator:
            raise RemoteProtocolError("sender", sender, f"{session.coordinator}, the session's coordinator")
        return session

    def lost(self, event: Lost) -> None:
        """End the sessions of a lost coordinator; let sessions that use a lost neighbour wait for another route."""
        self.parking.texts.forget(event.peer)
        for session in list(self.sessions.values()):
            place = session.place
            if event.peer == session.coordinator:
                session.park = None
                session.end()
            elif event.peer == place.previous or (place.onward and event.peer == place.onward.peer):
                me, lost = short_peer(self.links.me.peer), short_peer(event.peer)
                self._tasks.orphan(session, PeerDisconnected(f"{me} lost {lost}: {event.reason}"), about=event.peer)

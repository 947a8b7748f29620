"""One stage: takes windows in, runs its span over them, hands them on; at the tail, answers with verdicts.

Each session is one task with its own bounded queue; the model runs the windows of all of them together (`batcher`).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

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
from dsd_p2p.peers.failures import kind_of
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.session.stage import StageState
from dsd_p2p.session.tail import TailWalk
from dsd_p2p.stage.batcher import Batcher
from dsd_p2p.stage.parking import PARKED_S, Parked, ParkedTexts
from dsd_p2p.stage.recompute import Recomputer
from dsd_p2p.stage.session import BoundaryLog, Queued, StageSession
from dsd_p2p.stage.span_model import SpanCache, SpanModel
from dsd_p2p.stage.window_pass import StagePass
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import Endpoint, PeerId, Span, check_same_model, short_peer
from dsd_p2p.verification.choice import choose_verifier
from dsd_p2p.window.tracker import LineFit
from dsd_p2p.wire.hidden import HiddenFormat, packed_row_bytes
from dsd_p2p.wire.messages import (
    BASE,
    FILL_NODES,
    Cancel,
    CloseSession,
    Failure,
    Message,
    OpenSession,
    Recompute,
    Reveal,
    Revealed,
    Window,
)

logger = logging.getLogger(__name__)

_MAX_CLOSED_REMEMBERED = 1024
_CONNECT_TIMEOUT_S = 10.0
_PARKING_TIMEOUT_S = 5.0
_MIN_PASSES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What one stage grants.

    max_sessions: open at the same time. max_queued_windows, max_queued_bytes: of one session, waiting for the model.
    max_sessions_per_peer: of one coordinator. max_draft_slots: cache slots of one session beyond its longest text, and its most
        speculative nodes.
    max_boundary_bytes: of the hidden states that all sessions together keep to refill a neighbour.
    dials_routes: connect to the next stage by the address in the route; in a swarm, only members that are connected are sent to.
    orphan_s: what a session holds waits this long for another route after a neighbour was lost.
    max_parked: texts of closed sessions, as long as nobody needs their room. parked_s: and so long after they were parked.
    """

    max_sessions: int = 64
    max_sessions_per_peer: int = 16
    max_queued_windows: int = 512
    max_queued_bytes: int = 256 << 20
    max_draft_slots: int = 1024
    max_boundary_bytes: int = 256 << 20
    dials_routes: bool = True
    orphan_s: float = 15.0
    max_parked: int = 256
    parked_s: float = PARKED_S


class StageServer:
    """Serves a span, or for now nothing, to whoever opens sessions on it; a service of `dsd_p2p.peers.services`.

    sign: with the peer's own key, for sessions that ask for it.
    """

    takes = (OpenSession, Window, Cancel, CloseSession, Reveal, Recompute)

    def __init__(
        self,
        links: PeerLinks,
        model: SpanModel | None,
        limits: StageLimits,
        clock: Callable[[], float],
        sign: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._links = links
        self._model = model
        self._parts: dict[Span, SpanModel] = {}
        self._limits = limits
        self._clock = clock
        self._sign = sign
        self._model_in_use = trio.Lock()
        # Copies of parked texts take turns before they wait for the model, so that a pass comes between two of them.
        self._parking_in_use = trio.Lock()
        self._parked = ParkedTexts(limits.max_parked)
        self._recomputer = Recomputer(links, self._model_in_use, self._parked.evict)
        self._batcher = Batcher(self._model_in_use, clock, self._note_pass)
        self._sessions: dict[bytes, StageSession] = {}
        self._closed: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        self._is_draining = False
        self._layer_cost = LineFit()
        self._num_passes = 0

    @property
    def num_sessions(self) -> int:
        """Sessions that hold cache right now."""
        return len(self._sessions)

    @property
    def parked_bytes(self) -> int:
        """Cache that parked texts take until it is needed."""
        return self._parked.num_bytes

    @property
    def work(self) -> Batcher:
        """What is computed, and what waits for it."""
        return self._batcher

    def start(self, nursery: trio.Nursery) -> None:
        """Serve as long as the nursery is open; every cache is free afterwards."""
        self._nursery = nursery
        nursery.start_soon(self._batcher.serve)

    async def serve_span(self, model: SpanModel | None) -> None:
        """From now on serve `model`, which `links.me` describes already; sessions of what was served before end, and have ended."""
        sessions = list(self._sessions.values())
        for session in sessions:
            session.end(PeerDisconnected("this stage takes other layers"))
        for session in sessions:
            await session.is_over.wait()
        self._parked.clear()
        self._model = model
        self._parts = {}

    async def drain(self, timeout_s: float) -> None:
        """Take no new sessions; returns when those under way have ended, or have been ended after `timeout_s`."""
        self._is_draining = True
        with trio.move_on_after(timeout_s):
            for session in list(self._sessions.values()):
                await session.is_over.wait()
        for session in list(self._sessions.values()):
            session.end(PeerDisconnected("this stage is shutting down"))
        self._parked.clear()

    def measured_layer_s(self) -> tuple[float, float] | None:
        """Return the seconds of one layer's pass over 1 and over 16 positions, as lately measured; None before enough passes."""
        if self._num_passes < _MIN_PASSES:
            return None
        line = self._layer_cost.line()
        return line.at(1), line.at(16)

    # What arrives

    async def handle(self, event: Arrived) -> None:
        """Take in what a coordinator or a neighbouring stage sends."""
        assert self._nursery is not None, "start first"
        match event.message:
            case OpenSession() as opened:
                index = self._check_sender(opened, event.sender)
                try:
                    session = self._accept(opened, index)
                except (CapacityError, ConfigError, ModelError, PeerError) as exc:
                    self._nursery.start_soon(self._report, opened, exc)
                    return
                if session is not None:
                    self._nursery.start_soon(self._serve, session)
            case Window() as window:
                self._enqueue(window, event)
            case Cancel(session=name, epoch=epoch):
                if (owned := self._owned(name, event.sender)) is not None:
                    owned.state.cancel(epoch)
            case CloseSession(session=name, epoch=epoch, park=park):
                is_parked = park is None and self._parked.discard(event.sender, name)
                is_known = name in self._sessions or not is_parked
                owned = self._owned(name, event.sender) if is_known else None
                if owned is not None and epoch >= owned.opened.epoch:
                    owned.park = park
                    owned.end()
                self._remember_closed(event.sender, name, epoch)
            case Reveal(session=name, end=end):
                if (owned := self._owned(name, event.sender)) is not None:
                    rows, num_rows = owned.settled_rows(end)
                    self._nursery.start_soon(
                        self._answer, event.sender, Revealed(session=name, num_rows=num_rows), rows
                    )
            case Recompute() as recompute:
                self._nursery.start_soon(
                    self._recomputer.answer, self._model, event.sender, recompute, bytes(event.payload)
                )
            case _:
                raise AssertionError(event.message)

    def _accept(self, opened: OpenSession, index: int) -> StageSession | None:
        """Check an `OpenSession` and reserve what it needs; None when the coordinator closed it already."""
        if opened.epoch <= self._closed.get((opened.coordinator.peer, opened.session), -1):
            return None
        if self._model is None or self._links.me.span is None:
            raise PeerDisconnected("this peer holds no layers now: choose another")
        self._check_route(opened, index)
        me = self._links.me
        check_same_model(me.model, opened.model)
        if opened.max_length > me.max_positions:
            raise CapacityError(f"{opened.max_length} tokens exceed the model's {me.max_positions}: ask for fewer")
        is_kept = bool(opened.kept) and opened.kept[index]
        old = self._replaced(opened, is_kept=is_kept)
        span = opened.route[index].span
        model = self._parts.setdefault(span, self._model.narrow(span))
        is_tail = index == len(opened.route) - 1
        # Every stage refuses what the tail could not pick.
        verifier = choose_verifier(opened.text)
        read_format = opened.formats[index - 1] if opened.formats and index else HiddenFormat.MODEL
        put, take = trio.open_memory_channel[Queued](self._limits.max_queued_windows)
        session = StageSession(
            opened=opened,
            index=index,
            model=model,
            previous=_previous(opened, index),
            onward=None if is_tail else opened.route[index + 1],
            state=StageState(
                epoch=opened.epoch,
                max_length=opened.max_length,
                max_speculative=self._limits.max_draft_slots,
                num_held=opened.prefix.num_tokens if opened.prefix else 0,
            ),
            walk=_walk(opened, is_kept=is_kept) if is_tail else None,
            verifier=verifier.open(opened.num_prompt) if is_tail else None,
            read_format=read_format,
            write_format=opened.formats[index] if opened.formats and not is_tail else HiddenFormat.MODEL,
            row_bytes=packed_row_bytes(model.row_bytes, opened.model.compute, read_format),
            max_slots=opened.max_length + self._limits.max_draft_slots,
            replaces=old,
            is_kept=is_kept,
            put=put,
            take=take,
        )
        if old is not None:
            old.heir_waits = is_kept
            old.end()
        self._sessions[opened.session] = session
        return session

    def _replaced(self, opened: OpenSession, *, is_kept: bool) -> StageSession | None:
        """Return the session of this name that the new one takes the place of, having checked that there is room."""
        old = self._sessions.get(opened.session)
        if old is not None:
            if old.coordinator != opened.coordinator.peer or opened.epoch <= old.opened.epoch:
                raise RemoteProtocolError("epoch", opened.epoch, f"above {old.opened.epoch}, from the same coordinator")
        elif self._is_draining:
            raise PeerDisconnected("this stage is shutting down: choose another")
        elif len(self._sessions) >= self._limits.max_sessions:
            raise CapacityError(f"{self._limits.max_sessions} sessions are open here: try again later")
        else:
            num_theirs = sum(s.coordinator == opened.coordinator.peer for s in self._sessions.values())
            if num_theirs >= self._limits.max_sessions_per_peer:
                raise CapacityError(f"{num_theirs} of your sessions are open here already: end one, or try later")
        if is_kept and (old is None or old.cache is None or not _is_same_part(old, opened)):
            raise PeerDisconnected("nothing of this session is kept here: send all of it again")
        return old

    def _check_sender(self, opened: OpenSession, sender: PeerId) -> int:
        """Return this stage's index in the route; whoever sends it must stand before us there."""
        me = self._links.me.peer
        mine = [index for index, hop in enumerate(opened.route) if hop.peer == me]
        if len(mine) != 1:
            raise RemoteProtocolError("route", [hop.peer for hop in opened.route], f"{me} exactly once")
        if sender != _previous(opened, mine[0]):
            raise RemoteProtocolError("sender", sender, f"{_previous(opened, mine[0])}, the stage before in the route")
        return mine[0]

    def _check_route(self, opened: OpenSession, index: int) -> None:
        route, me, span = opened.route, self._links.me, opened.route[index].span
        if len({hop.peer for hop in route}) != len(route):
            raise RemoteProtocolError("route", [hop.peer for hop in route], "each peer once")
        if me.span is None or not me.span.first <= span.first < span.last <= me.span.last:
            raise RemoteProtocolError("span", str(span), f"inside this stage's {me.span}")
        bounds = [0, *(hop.span.last for hop in route)]
        prefix, is_whole = opened.prefix, not any(opened.kept) and not opened.attest
        if not opened.num_prompt <= opened.num_given <= opened.max_length:
            limit = f"{opened.num_prompt} to {opened.max_length}, the prompt's and the text's length"
            raise RemoteProtocolError("num_given", opened.num_given, limit)
        if prefix is not None and (prefix.num_tokens >= opened.num_given or not is_whole):
            raise RemoteProtocolError(
                "prefix", prefix.num_tokens, f"below {opened.num_given}, nothing kept or attested"
            )
        if prefix is not None and prefix.num_tokens > opened.num_prompt:
            raise RemoteProtocolError("prefix", prefix.num_tokens, f"at most the {opened.num_prompt} of the prompt")
        if [hop.span.first for hop in route] != bounds[:-1] or bounds[-1] != me.num_layers:
            raise RemoteProtocolError("route spans", [str(hop.span) for hop in route], f"layers 0..{me.num_layers}")

    def _enqueue(self, window: Window, event: Arrived) -> None:
        session = self._sessions.get(window.session)
        if session is None:
            self._links.transport.penalise(event.sender)
            return
        if session.is_orphan or session.state.is_stale(window):
            return
        if event.sender != session.previous:
            if window.epoch < session.opened.epoch:
                return
            raise RemoteProtocolError("sender", event.sender, f"{session.previous}, the stage before in the route")
        if session.model.is_head and (window.costs or window.link_bytes or window.waited):
            measured = (window.costs, window.link_bytes, window.waited)
            raise RemoteProtocolError("costs, link_bytes, waited", measured, "none before the head")
        expected_bytes = 0 if session.model.is_head else len(window.tokens) * session.row_bytes
        if len(event.payload) != expected_bytes:
            raise RemoteProtocolError("payload length", len(event.payload), f"{expected_bytes} bytes")
        session.received_bytes += event.num_bytes
        session.queued_bytes += expected_bytes
        if session.queued_bytes > self._limits.max_queued_bytes:
            session.end(CapacityError(f"{session.queued_bytes} bytes of windows wait here: send them more slowly"))
            return
        try:
            session.put.send_nowait(Queued(window, bytes(event.payload), self._clock()))
        except trio.WouldBlock:
            session.end(CapacityError(f"{self._limits.max_queued_windows} windows wait here: send them more slowly"))
        except trio.BrokenResourceError:
            pass

    def lost(self, event: Lost) -> None:
        """End what a lost coordinator opened; what goes through a lost neighbour waits for another route."""
        self._parked.forget(event.peer)
        for session in list(self._sessions.values()):
            if event.peer == session.coordinator:
                session.park = None
                session.end()
            elif event.peer == session.previous or (session.onward and event.peer == session.onward.peer):
                self._orphan(
                    session,
                    PeerDisconnected(
                        f"{short_peer(self._links.me.peer)} lost {short_peer(event.peer)}: {event.reason}"
                    ),
                    about=event.peer,
                )

    def _orphan(self, session: StageSession, error: PeerError, about: str = "") -> None:
        """Let a session wait for another route; `about` is the neighbour it cannot do with."""
        assert self._nursery is not None
        if session.is_orphan:
            return
        session.is_orphan = True
        session.scope.deadline = trio.current_time() + self._limits.orphan_s
        self._nursery.start_soon(self._report, session.opened, error, about)

    def _owned(self, name: bytes, sender: PeerId) -> StageSession | None:
        session = self._sessions.get(name)
        if session is None:
            self._links.transport.penalise(sender)
            return None
        if sender != session.coordinator:
            raise RemoteProtocolError("sender", sender, f"{session.coordinator}, the session's coordinator")
        return session

    # One session

    async def _serve(self, session: StageSession) -> None:
        """Handle the session's windows in order until it ends; tells the coordinator when that is our doing."""
        name = session.opened.session
        logger.info(
            "session opened session=%s span=%s kept=%s",
            name.hex(),
            session.opened.route[session.index].span,
            session.is_kept,
        )
        try:
            with session.scope, session.take:
                await self._take_over(session)
                await self._open_onward(session)
                while True:
                    with trio.fail_after(session.opened.idle_timeout_s):
                        queued = await session.take.receive()
                    session.queued_bytes -= len(queued.payload)
                    await self._handle(session, queued)
        except trio.TooSlowError:
            session.error = PeerTimeout(f"stage heard nothing for {session.opened.idle_timeout_s:g} s")
        except DsdError as exc:
            session.error = exc
        except Exception as exc:  # task boundary: one session's failed pass must not end the others
            logger.exception("pass failed session=%s", name.hex())
            session.error = ModelError(f"a stage failed: {type(exc).__name__}; see its log")
        finally:
            if session.cache is not None and not session.heir_waits and not self._park(session, session.cache):
                session.cache.free()
            session.is_over.set()
            if self._sessions.get(name) is session:
                del self._sessions[name]
            logger.info("session closed session=%s error=%s", name.hex(), session.error)
        if session.error is not None:
            self._remember_closed(session.coordinator, name, session.opened.epoch)
            if not session.is_orphan:
                await self._report(session.opened, session.error, session.about)

    async def _take_over(self, session: StageSession) -> None:
        """Start with an empty cache, or with what the session before holds."""
        old, session.replaces = session.replaces, None
        if old is not None:
            # Its last pass may still run in its thread; only then is its cache free.
            await old.is_over.wait()
        if old is None or not session.is_kept:
            await self._until_parked(session)
            cache = await self._new_cache(session)
            try:
                await self._copy_prefix(session, cache)
            except BaseException:
                cache.free()
                raise
            session.cache = cache
            if session.walk is None and session.opened.prefix is None:
                session.log = BoundaryLog(self._written_row_bytes(session))
            return
        session.cache, session.log, old.cache = old.cache, old.log, None
        assert session.cache is not None
        opened = session.opened
        session.verifier = old.verifier
        if session.verifier is not None:
            # The root is given once more, and with it the token that it holds.
            session.verifier.rewind(max(opened.num_prompt, opened.num_given - 1))
        old_state, session.state = session.state, old.state
        edits = session.state.resume(epoch=old_state.epoch, at=opened.resume, num_kept=opened.num_given - 1)
        for edit in edits:
            session.edit(edit)

    async def _until_parked(self, session: StageSession) -> None:
        """Let the session whose text we go on from come to its end.

        It may still be in a pass. And its close comes straight from the coordinator, our opening over the chain.
        """
        prefix = session.opened.prefix
        writing = self._sessions.get(prefix.session) if prefix is not None else None
        if writing is not None and writing is not session and writing.coordinator == session.coordinator:
            with trio.move_on_after(_PARKING_TIMEOUT_S):
                await writing.is_over.wait()

    async def _new_cache(self, session: StageSession) -> SpanCache:
        """An empty cache; what is parked makes room for it."""
        with suppress(CapacityError):
            return session.model.new_cache(session.max_slots)
        # Nobody copies what is parked meanwhile, so that it is free once it is evicted.
        async with self._parking_in_use, self._model_in_use:
            while True:
                try:
                    return session.model.new_cache(session.max_slots)
                except CapacityError:
                    if not self._parked.evict():
                        raise

    async def _copy_prefix(self, session: StageSession, cache: SpanCache) -> None:
        if (prefix := session.opened.prefix) is None:
            return
        async with self._parking_in_use, self._model_in_use:
            parked = self._parked.find(session.coordinator, prefix, session.opened.route[session.index].span)
            with parked.in_use() as held:
                await trio.to_thread.run_sync(cache.copy, held, prefix.num_tokens)

    def _park(self, session: StageSession, cache: SpanCache) -> bool:
        """Hold the text of a session that is over, if its coordinator wishes it; False when the cache is to be freed."""
        park, opened = session.park, session.opened
        if park is None or session.error is not None or self._is_draining or self._nursery is None:
            return False
        try:
            for edit in session.state.resume(epoch=opened.epoch, at=park.at, num_kept=park.num_tokens):
                cache.edit(edit)
        except Exception as exc:  # task boundary: whatever its coordinator made up, the session ends
            logger.warning("text not parked session=%s error=%s", opened.session.hex(), exc)
            return False
        parked = Parked(
            coordinator=session.coordinator,
            session=opened.session,
            span=opened.route[session.index].span,
            cache=cache,
            num_tokens=park.num_tokens,
        )
        self._parked.add(parked)
        self._nursery.start_soon(self._hold, parked)
        return True

    async def _hold(self, parked: Parked) -> None:
        with parked.scope:
            try:
                async with self._parking_in_use, self._model_in_use:
                    with parked.in_use() as cache:
                        await trio.to_thread.run_sync(cache.shrink)
                await trio.sleep(self._limits.parked_s)
            except Exception:  # task boundary: a text that cannot be held is no reason to stop serving
                logger.exception("parked text lost session=%s", parked.session.hex())
            finally:
                self._parked.remove(parked)

    def _written_row_bytes(self, session: StageSession) -> int:
        return packed_row_bytes(session.model.row_bytes, session.opened.model.compute, session.write_format)

    async def _open_onward(self, session: StageSession) -> None:
        """Open the session at the next stage, and refill that one if it lost what we still have."""
        onward, opened = session.onward, session.opened
        next_hop = Endpoint(onward.peer, onward.address) if onward else opened.coordinator
        try:
            await self._reach(next_hop)
            if onward is None:
                return
            await self._links.send(PeerId(onward.peer), opened)
            if session.is_kept and not opened.kept[session.index + 1]:
                await self._refill(session, PeerId(onward.peer))
        except PeerError as exc:
            self._orphan(session, exc, about="" if self._links.is_connected(next_hop.peer) else next_hop.peer)

    async def _reach(self, hop: Endpoint) -> None:
        if self._links.is_connected(hop.peer):
            return
        if not self._limits.dials_routes:
            raise PeerDisconnected(f"{short_peer(self._links.me.peer)} is not connected to {short_peer(hop.peer)}")
        await self._links.connect(hop.address, _CONNECT_TIMEOUT_S)

    async def _refill(self, session: StageSession, to: PeerId) -> None:
        """Send the hidden states of everything given, as windows of the new epoch."""
        opened, log = session.opened, session.log
        num_nodes = opened.num_given - 1
        if log is None or log.num_rows < num_nodes:
            raise PeerDisconnected("the hidden states for a refill are not kept here: send all of it again")
        for number, start in enumerate(range(0, num_nodes, FILL_NODES)):
            positions = tuple(range(start, min(start + FILL_NODES, num_nodes)))
            window = Window(
                session=opened.session,
                epoch=opened.epoch,
                window=number,
                root=(opened.epoch, start - 1),
                first_node=start,
                tokens=log.tokens(start, positions[-1] + 1),
                parents=tuple(position - 1 for position in positions),
                positions=positions,
            )
            await self._links.send(to, window, log.rows(start, positions[-1] + 1))

    async def _handle(self, session: StageSession, queued: Queued) -> None:
        answer = await self._batcher.run(StagePass(session, queued, self._sign))
        self._bound_log(session)
        if answer is None or self._is_refill_for_us_alone(session, queued.window):
            return
        to = session.coordinator if session.onward is None else PeerId(session.onward.peer)
        try:
            await self._links.send(to, *answer)
        except PeerError as exc:
            self._orphan(session, exc, about=to)

    def _is_refill_for_us_alone(self, session: StageSession, window: Window) -> bool:
        """True when the next stage has kept what this window holds."""
        opened = session.opened
        is_given = window.epoch == opened.epoch and window.positions[-1] < opened.num_given - 1
        return bool(opened.kept) and is_given and session.onward is not None and opened.kept[session.index + 1]

    def _bound_log(self, session: StageSession) -> None:
        """Over the budget, refilling is given up: a replay takes longer but holds nothing."""
        held_bytes = sum(each.log.num_bytes for each in self._sessions.values() if each.log is not None)
        if held_bytes > self._limits.max_boundary_bytes:
            session.log = None

    def _note_pass(self, work: StagePass, num_rows: int, seconds: float) -> None:
        session = work.session
        self._layer_cost.add(num_rows, seconds / session.opened.route[session.index].span.num_layers)
        self._num_passes += 1

    # Spot checks

    async def _answer(self, to: PeerId, message: Message, payload: bytes) -> None:
        with suppress(PeerError), trio.move_on_after(_CONNECT_TIMEOUT_S):
            await self._links.send(to, message, payload)

    def _remember_closed(self, coordinator: str, name: bytes, epoch: int) -> None:
        """A close can overtake the open that travels down the chain: an `OpenSession` up to this epoch is ignored."""
        key = (coordinator, name)
        self._closed[key] = max(epoch, self._closed.get(key, -1))
        self._closed.move_to_end(key)
        while len(self._closed) > _MAX_CLOSED_REMEMBERED:
            self._closed.popitem(last=False)

    async def _report(self, opened: OpenSession, error: DsdError, about: str = "") -> None:
        logger.warning("session failed session=%s error=%s", opened.session.hex(), error)
        failure = Failure(
            session=opened.session, epoch=opened.epoch, kind=kind_of(error), peer=about, text=str(error)[:512]
        )
        with suppress(PeerError), trio.move_on_after(_CONNECT_TIMEOUT_S):
            await self._links.send(PeerId(opened.coordinator.peer), failure)


def _previous(opened: OpenSession, index: int) -> PeerId:
    return PeerId(opened.route[index - 1].peer if index else opened.coordinator.peer)


def _is_same_part(old: StageSession, opened: OpenSession) -> bool:
    index = next(index for index, hop in enumerate(opened.route) if hop.peer == old.opened.route[old.index].peer)
    return old.opened.route[old.index].span == opened.route[index].span


def _walk(opened: OpenSession, *, is_kept: bool) -> TailWalk:
    num_held = opened.num_given - 1 if is_kept else opened.prefix.num_tokens if opened.prefix else 0
    at = num_held - 1 if num_held else BASE
    return TailWalk(epoch=opened.epoch, num_prompt=opened.num_prompt, num_given=opened.num_given, at=at)

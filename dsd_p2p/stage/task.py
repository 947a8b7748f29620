"""Runs a session from opening to end: takes over or creates its cache, opens the next stage, computes its windows."""

import logging
from collections.abc import Callable
from contextlib import suppress

import trio

from dsd_p2p.errors import CapacityError, DsdError, ModelError, PeerDisconnected, PeerError, PeerTimeout
from dsd_p2p.peers.failures import kind_of
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.batcher import Batcher
from dsd_p2p.stage.compiling import compile_constraint
from dsd_p2p.stage.parking import Parking
from dsd_p2p.stage.refill import ends_here, refill
from dsd_p2p.stage.session import BoundaryLog, Held, Phase, Queued, StageSession
from dsd_p2p.stage.window_pass import WindowPass
from dsd_p2p.types import Endpoint, PeerId, short_peer
from dsd_p2p.wire.attest import PROBE_BYTES
from dsd_p2p.wire.messages import Failure, OpenSession

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_PARKING_TIMEOUT_S = 5.0


class SessionTasks:
    """The tasks of a stage's sessions.

    sessions: the open sessions by name; each task removes its own at the end.
    sign: signs with the peer's own key, for sessions that ask for attestations.
    """

    def __init__(
        self,
        links: PeerLinks,
        batcher: Batcher,
        parking: Parking,
        limits: StageLimits,
        sign: Callable[[bytes], bytes] | None,
    ) -> None:
        self.sessions: dict[bytes, StageSession] = {}
        self._links = links
        self._batcher = batcher
        self._parking = parking
        self._limits = limits
        self._sign = sign
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Use `nursery` for the tasks that report failures."""
        self._nursery = nursery

    async def run(self, session: StageSession, failed: Callable[[StageSession], None]) -> None:
        """Handle the session's windows in order until it ends. Report an error to the coordinator.

        failed: called if the session ended with an error.
        """
        name = session.opened.session
        logger.info("session opened session=%s span=%s", name.hex(), session.place.span)
        # The stages before this one need time for the first window too.
        num_before, idle_s = session.place.index, session.opened.idle_timeout_s
        wait_s = min(idle_s, self._limits.first_window_s * (1 + num_before))
        try:
            with session.scope, session.inbox.take:
                await self._take_over(session)
                if session.tail is not None:
                    await compile_constraint(session.place.model, session.opened.text)
                session.phase = Phase.SERVING
                await self._open_onward(session)
                while True:
                    with trio.fail_after(wait_s):
                        queued = await session.inbox.next()
                    wait_s = idle_s
                    await self._compute(session, queued)
        except trio.TooSlowError:
            session.error = PeerTimeout(f"the stage received no window for {wait_s:g} s")
        except DsdError as exc:
            session.error = exc
        except Exception as exc:  # task boundary: one session's failed pass must not end the others
            logger.exception("pass failed session=%s", name.hex())
            session.error = ModelError(f"a stage failed: {type(exc).__name__}; see its log")
        finally:
            was_orphan = session.is_orphan
            self._let_go(session)
            session.is_over.set()
            if self.sessions.get(name) is session:
                del self.sessions[name]
            logger.info("session closed session=%s phase=%s error=%s", name.hex(), session.phase.name, session.error)
        if session.error is not None:
            failed(session)
            if not was_orphan:
                await self.report(session.opened, session.error, session.about)

    def _let_go(self, session: StageSession) -> None:
        """Hand over, park, or free what the session holds."""
        cache = session.held.cache
        if cache is None:
            session.phase = Phase.CLOSED
        elif session.has_heir:
            session.phase = Phase.HANDED_OVER
        elif self._parking.park(session):
            session.phase = Phase.PARKED
        else:
            session.phase = Phase.CLOSED
            cache.free()

    # Opening

    async def _take_over(self, session: StageSession) -> None:
        """Start with an empty cache, or with the state that the earlier session holds."""
        old, session.replaces = session.replaces, None
        if old is not None:
            await self._until_over(old)
        if old is None or not session.place.is_kept:
            await self._start_empty(session)
            return
        opened, epoch = session.opened, session.held.state.epoch
        session.held = Held(state=old.held.state, cache=old.held.cache, log=old.held.log)
        old.held.cache = None
        if session.tail is not None and old.tail is not None:
            session.tail.verifier = old.tail.verifier
            # The root is given again, and with it its token.
            session.tail.verifier.rewind(max(opened.num_prompt, opened.num_given - 1))
        session.held.resume(epoch=epoch, at=opened.resume, num_kept=opened.num_given - 1)

    async def _until_over(self, old: StageSession) -> None:
        """Wait until the earlier session is over, because its last pass may still be using its cache.

        If cancelled, leave the cache to the earlier session, or free it if that one has already handed it over.
        """
        try:
            await old.is_over.wait()
        except trio.Cancelled:
            if old.phase is Phase.HANDED_OVER and old.held.cache is not None:
                old.held.cache.free()
            old.has_heir = False
            raise

    async def _start_empty(self, session: StageSession) -> None:
        await self._until_parked(session)
        # Whoever is at the bound must not evict what others have parked.
        self._check_room(session, 1)
        cache = await self._parking.new_cache(session, session.opened.max_length + self._limits.max_draft_slots)
        try:
            self._check_room(session, cache.num_bytes)
            await self._parking.copy_prefix(session, cache)
        except BaseException:
            cache.free()
            raise
        session.held.cache = cache
        if session.tail is None and session.opened.prefix is None:
            session.held.log = BoundaryLog(session.place.written_row_bytes)
        elif session.opened.attest:
            session.held.log = BoundaryLog(PROBE_BYTES)

    def _check_room(self, session: StageSession, num_bytes: int) -> None:
        """Check that the session's peer may take `num_bytes` more of the cache.

        Raises:
            CapacityError: it may not.
        """
        caches = ((each.coordinator, each.held.cache) for each in self.sessions.values())
        held = [(coordinator, cache.num_bytes) for coordinator, cache in caches if cache is not None]
        self._limits.cache_bytes.check(held, session.coordinator, num_bytes, self._links.root_of)

    async def _until_parked(self, session: StageSession) -> None:
        """Wait for the end of the session whose text is our prefix.

        It may still be in a pass, or its close may not have arrived: the close comes directly from the coordinator, our
        opening down the route.
        """
        prefix = session.opened.prefix
        writing = self.sessions.get(prefix.session) if prefix is not None else None
        if writing is not None and writing is not session and writing.coordinator == session.coordinator:
            with trio.move_on_after(_PARKING_TIMEOUT_S):
                await writing.is_over.wait()

    async def _open_onward(self, session: StageSession) -> None:
        """Open the session at the next stage, and refill that stage if we keep what we hold and it does not."""
        place, opened = session.place, session.opened
        onward = place.onward
        next_peer = Endpoint(onward.peer, onward.address) if onward else opened.coordinator
        try:
            await self._reach(next_peer)
            if onward is None:
                return
            await self._links.send(PeerId(onward.peer), opened)
            if place.is_kept and not place.next_is_kept:
                await refill(self._links, session, PeerId(onward.peer))
        except PeerError as exc:
            self.orphan(session, exc, about="" if self._links.is_connected(next_peer.peer) else next_peer.peer)

    async def _reach(self, peer: Endpoint) -> None:
        if self._links.is_connected(peer.peer):
            return
        if not self._limits.dials_routes:
            me = short_peer(self._links.me.peer)
            raise PeerDisconnected(f"{me} is not connected to {short_peer(peer.peer)}")
        await self._links.connect(peer.address, _CONNECT_TIMEOUT_S)

    # Serving

    async def _compute(self, session: StageSession, queued: Queued) -> None:
        answer = await self._batcher.run(WindowPass(session, queued, self._sign))
        self._bound_logs(session)
        if answer is None or ends_here(session, queued.window):
            return
        onward = session.place.onward
        to = session.coordinator if onward is None else PeerId(onward.peer)
        try:
            await self._links.send(to, *answer)
        except PeerError as exc:
            self.orphan(session, exc, about=to)

    def _bound_logs(self, session: StageSession) -> None:
        """Drop the logs that are only there for refills if all exceed the budget. Without one a replay takes longer.

        Raises:
            CapacityError: the session is audited. Without its rows it would look like a lie.
        """
        if self._log_bytes() <= self._limits.max_boundary_bytes:
            return
        for each in self.sessions.values():
            if not each.opened.attest:
                each.held.log = None
        if session.opened.attest and self._log_bytes() > self._limits.max_boundary_bytes:
            raise CapacityError("the rows of audited answers fill this stage's memory for them: try again later")

    def _log_bytes(self) -> int:
        logs = (each.held.log for each in self.sessions.values())
        return sum(log.num_bytes for log in logs if log is not None)

    def orphan(self, session: StageSession, error: PeerError, about: str = "") -> None:
        """Let a session wait for another route, and tell its coordinator why.

        about: the neighbour that cannot be reached.
        """
        assert self._nursery is not None, "start first"
        if session.is_orphan:
            return
        session.phase = Phase.ORPHANED
        session.scope.deadline = trio.current_time() + self._limits.orphan_s
        self._nursery.start_soon(self.report, session.opened, error, about)

    async def report(self, opened: OpenSession, error: DsdError, about: str = "") -> None:
        """Tell the coordinator that its session cannot go on here.

        about: the neighbour that the error is about, if any.
        """
        logger.warning("session failed session=%s error=%s", opened.session.hex(), error)
        failure = Failure(
            session=opened.session, epoch=opened.epoch, kind=kind_of(error), peer=about, text=str(error)[:512]
        )
        with suppress(PeerError), trio.move_on_after(_CONNECT_TIMEOUT_S):
            await self._links.send(PeerId(opened.coordinator.peer), failure)

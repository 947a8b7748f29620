"""Performs what a coordinator machine asks for, on real peers, until the request is finished."""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from dsd_p2p.coordination.audit import Auditor, Turn
from dsd_p2p.drafting.base import DraftSession
from dsd_p2p.errors import (
    DishonestPeer,
    DsdError,
    PeerDisconnected,
    PeerError,
    PeerTimeout,
    PrefixLost,
    RemoteProtocolError,
)
from dsd_p2p.peers.failures import error_of
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.placement.route import Detour
from dsd_p2p.placement.view import PlannedStage
from dsd_p2p.session.effects import Candidate, Carried, Draft, Effect, Emit, Finish, Replay, Send
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Route
from dsd_p2p.telemetry.watch import RequestWatch
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import PeerId
from dsd_p2p.wire.messages import CloseSession, Failure, Message, OpenSession, Verdict, Window

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 2.0
_BLAME_S = 30.0
_BLAME_LINK_S = 5.0
"""Heartbeats tell of a broken link by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A draft is done."""

    children: list[list[Candidate]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerouted:
    """A chain was found again, or was not."""

    route: Route | None
    error: DsdError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a stage says of this request."""

    sender: PeerId
    message: Verdict | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A spot check is over. error: who lied."""

    error: DishonestPeer | None


Event = Told | Lost | Drafted | Rerouted | Checked


class RequestDriver:
    """One request's loop: wait for an event or the deadline, tell the machine, do what it says.

    find_route: finds a chain of stages; called again after a chain is lost.
    auditor: checks the stages. distrust: is told who lied. watch: tells what happens. committed: is told how many tokens came.
    """

    def __init__(
        self,
        machine: RequestMachine,
        links: PeerLinks,
        drafter: DraftSession,
        *,
        is_instant_drafter: bool,
        find_route: Callable[[Detour], Awaitable[Route]],
        auditor: Auditor | None = None,
        distrust: Callable[[DishonestPeer], None] = lambda _error: None,
        watch: RequestWatch | None = None,
        committed: Callable[[int], None] = lambda _count: None,
        inbox_size: int = 1024,
    ) -> None:
        self._machine = machine
        self._links = links
        self._drafter = drafter
        self._is_instant_drafter = is_instant_drafter
        self._find_route = find_route
        self._auditor = auditor
        self._distrust = distrust
        self._watch = watch
        self._committed = committed
        self._is_checking = False
        self._check_is_over = trio.Event()
        self._avoided_peers: dict[str, float] = {}
        self._avoided_links: dict[tuple[str, str], float] = {}
        self.inbox, self._events = trio.open_memory_channel[Event](inbox_size)
        self._pending: deque[Effect] = deque()
        self.finish: Finish | None = None
        self._is_drafter_broken = False
        self._scope = trio.CancelScope()
        self._is_over = trio.Event()

    def involves(self, peer: PeerId) -> bool:
        """True when `peer` is a stage of the present chain: nobody else has a say in this request."""
        return self._machine.involves(peer)

    async def run(self, output: trio.MemorySendChannel[Emit]) -> None:
        """Generate, sending each batch of committed tokens to `output`; closes it. Cancelling frees the stages' caches."""
        try:
            with self._scope, output:
                async with trio.open_nursery() as nursery:
                    self._pending.extend(self._machine.start(trio.current_time()))
                    while await self._perform(output, nursery):
                        event = await self._next_event()
                        self._pending.extend(self._heed_carried(self._tell(event)))
                        self._check_if_due(nursery)
                        await self._wait_for_overdue_check()
                    nursery.cancel_scope.cancel()
        finally:
            try:
                await self._close_stages()
            finally:
                self._is_over.set()
            if self._watch is not None:
                finish = self.finish
                self._watch.ended(finish.reason if finish else "left", str(finish.error or "") if finish else "")

    async def stop(self) -> None:
        """End the request if it still goes on; returns once nothing of it runs."""
        self._scope.cancel()
        await self._is_over.wait()

    async def _next_event(self) -> Event | None:
        with suppress(trio.WouldBlock):
            # What has arrived counts, even if the reader kept us from it until after the deadline.
            return self._events.receive_nowait()
        with trio.move_on_at(self._machine.deadline_s):
            return await self._events.receive()
        return None

    def _tell(self, event: Event | None) -> Sequence[Effect]:
        now_s = trio.current_time()
        match event:
            case None:
                return self._machine.wake(now_s)
            case Told(sender=sender, message=message):
                return self._hear(sender, message, now_s)
            case Drafted(children=children):
                return self._machine.drafted(children, now_s)
            case Checked(error=error):
                self._is_checking = False
                return [] if error is None else self._caught(error, self._machine.abort(error))
            case Lost(peer=peer) if not self.involves(peer):
                return []
            case Lost(peer=peer, reason=reason):
                return self._machine.lost(PeerDisconnected(f"lost stage {peer}: {reason}"), now_s, gone=peer)
            case Rerouted(route=route, error=error):
                if route is not None:
                    return self._machine.reopen(route, now_s)
                return self._machine.route_not_found(error or PeerDisconnected("no chain"), now_s)

    def _hear(self, sender: PeerId, message: Verdict | Failure, now_s: float) -> Sequence[Effect]:
        if isinstance(message, Failure):
            error = error_of(message.kind, message.text)
            if message.peer:
                self._avoided_links[sender, message.peer] = now_s + _BLAME_LINK_S
            elif not isinstance(error, PeerDisconnected | PeerTimeout | PrefixLost):
                self._blame(sender, error)
            return self._machine.failed(message.epoch, error, now_s)
        try:
            if self._auditor is not None:
                self._auditor.heard(message)
            effects = self._machine.receive(message, now_s)
        except DishonestPeer as exc:
            # Caught before its verdict counted: nothing wrong was written.
            return self._caught(exc, self._machine.lost(exc, now_s))
        except RemoteProtocolError as exc:
            self._blame(sender, exc)
            return self._machine.lost(exc, now_s)
        if self._watch is not None:
            self._watch.verdict(message)
        return effects

    def _heed_carried(self, effects: Sequence[Effect]) -> Iterator[Effect]:
        """Tell the auditor at once which nodes were committed: the next spot check goes by it. Yields the other effects."""
        for effect in effects:
            if not isinstance(effect, Carried):
                yield effect
            elif self._auditor is not None:
                self._auditor.committed(effect.position, effect.epoch, effect.node)

    def _caught(self, error: DishonestPeer, effects: Sequence[Effect]) -> Sequence[Effect]:
        self._blame(PeerId(error.peer), error)
        self._distrust(error)
        return effects

    def _check_if_due(self, nursery: trio.Nursery) -> None:
        if self._auditor is None or self._machine.is_finished:
            return
        if self._is_checking:
            return
        turn = self._auditor.turn(self._machine.tokens)
        if turn is not None:
            self._is_checking, self._check_is_over = True, trio.Event()
            nursery.start_soon(self._check, self._auditor, turn)

    async def _wait_for_overdue_check(self) -> None:
        """Spot checks keep up with the text: what they would find must not be written far past."""
        if self._auditor is not None and self._is_checking and self._auditor.is_overdue:
            await self._check_is_over.wait()

    async def _check(self, auditor: Auditor, turn: Turn) -> None:
        error = None
        try:
            await auditor.check(turn)
        except DishonestPeer as exc:
            error = exc
        except Exception:  # task boundary: a check that goes wrong says nothing of the stage
            logger.exception("spot check failed")
        finally:
            self._check_is_over.set()
        await self.inbox.send(Checked(error=error))

    async def _perform(self, output: trio.MemorySendChannel[Emit], nursery: trio.Nursery) -> bool:
        """Do everything pending; False once the request is finished."""
        while self._pending:
            # Taken off only when it is done: a close that is cancelled on its way must be sent again.
            match self._pending[0]:
                case Send(to=to, message=message):
                    if self._auditor is not None:
                        self._follow(self._auditor, message)
                    if self._watch is not None and isinstance(message, OpenSession):
                        self._watch.opened(message)
                    try:
                        await self._links.send(to, message)
                    except PeerError as exc:
                        # One that is to close the session may be gone: that is as good.
                        if not isinstance(message, CloseSession):
                            self._pending.extend(self._machine.lost(exc, trio.current_time()))
                case Emit() as emit:
                    self._committed(len(emit.tokens))
                    # A reader that has gone stops us by `stop`; until then nobody misses these.
                    with suppress(trio.BrokenResourceError):
                        await output.send(emit)
                case Draft() as draft if self._is_instant_drafter:
                    children = self._expand(draft)
                    self._pending.extend(self._machine.drafted(children, trio.current_time()))
                case Draft() as draft:
                    nursery.start_soon(self._draft, draft)
                case Replay(delay_s=delay_s, reason=reason):
                    logger.warning("chain lost, replaying delay_s=%.2f reason=%s", delay_s, reason)
                    nursery.start_soon(self._reroute, delay_s)
                case Finish() as finish:
                    self.finish = finish
            self._pending.popleft()
        return self.finish is None

    def _follow(self, auditor: Auditor, message: Message) -> None:
        match message:
            case OpenSession(route=route, model=model):
                auditor.opened(route, model)
            case Window() as window:
                auditor.sent(window, len(self._machine.tokens))
            case _:
                pass

    async def _draft(self, draft: Draft) -> None:
        children = await trio.to_thread.run_sync(self._expand, draft)
        await self.inbox.send(Drafted(children=children))

    def _expand(self, draft: Draft) -> list[list[Candidate]]:
        """Ask the drafter; one that fails is not asked again, and the text goes on without it."""
        if not self._is_drafter_broken:
            try:
                return self._drafter.expand(draft)
            except Exception:  # a guess is never worth the answer
                logger.exception("drafter failed, going on without it")
                self._is_drafter_broken = True
        return [[] for _ in draft.stems]

    def _blame(self, peer: PeerId, error: DsdError) -> None:
        """Leave the peer out of this request's chains for a while."""
        logger.warning("stage avoided peer=%s error=%s", peer, error)
        self._avoided_peers[peer] = trio.current_time() + _BLAME_S

    async def _reroute(self, delay_s: float) -> None:
        await trio.sleep(delay_s)
        now_s = trio.current_time()
        detour = Detour(
            peers=frozenset(peer for peer, until_s in self._avoided_peers.items() if until_s > now_s),
            links=frozenset(link for link, until_s in self._avoided_links.items() if until_s > now_s),
            kept=frozenset(PlannedStage(peer=PeerId(hop.peer), span=hop.span) for hop in self._machine.route.hops),
        )
        try:
            result = Rerouted(route=await self._find_route(detour))
        except DsdError as exc:
            result = Rerouted(route=None, error=exc)
        await self.inbox.send(result)

    async def _close_stages(self) -> None:
        """Close the session at every stage, also when we are cancelled."""
        with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_TIMEOUT_S):
            for effect in [*self._pending, *self._machine.stop()]:
                if isinstance(effect, Send) and isinstance(effect.message, CloseSession):
                    with suppress(PeerError):
                        await self._links.send(effect.to, effect.message)

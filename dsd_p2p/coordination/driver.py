"""Performs the effects of a `RequestMachine` on real peers until the request is finished."""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import trio

from dsd_p2p.coordination.avoided import Avoided
from dsd_p2p.coordination.checking import SpotChecks
from dsd_p2p.coordination.guessing import Guesses
from dsd_p2p.errors import (
    AuditIncomplete,
    DishonestPeer,
    DsdError,
    PeerDisconnected,
    PeerError,
    PeerLeaving,
    PeerTimeout,
    PrefixLost,
    RemoteProtocolError,
)
from dsd_p2p.peers.failures import error_of
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.placement.route import Detour
from dsd_p2p.session.effects import Candidate, Carried, Draft, Effect, Emit, Finish, Replay, Send
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Route
from dsd_p2p.telemetry.watch import RequestWatch
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import PeerId, short_peer
from dsd_p2p.wire.messages import CloseSession, Failure, OpenSession, Verdict
from dsd_p2p.wire.opening import signed_opening

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 2.0
_INBOX_EVENTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """The drafter's answer has arrived."""

    children: list[list[Candidate]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerouted:
    """The search for another route ended, with a route or with an error."""

    route: Route | None
    error: DsdError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A stage sent a message about this request."""

    sender: PeerId
    message: Verdict | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A spot check is over. error: what ends the answer, or None."""

    error: PeerError | None


Event = Told | Lost | Drafted | Rerouted | Checked


class RequestDriver:
    """The event loop of one request: wait for an event or the deadline, report it to the machine, perform its effects.

    find_route: finds another route after one is lost. checks: the spot checks of an audited request.
    watch: reports the request's progress to telemetry. committed: called with the number of tokens of each batch.
    """

    def __init__(
        self,
        machine: RequestMachine,
        links: PeerLinks,
        guesses: Guesses,
        find_route: Callable[[Detour], Awaitable[Route]],
        *,
        checks: SpotChecks | None = None,
        watch: RequestWatch | None = None,
        committed: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._machine = machine
        self._links = links
        self._guesses = guesses
        self._find_route = find_route
        self.checks = checks
        self._watch = watch
        self._committed = committed
        self._avoided = Avoided()
        self.inbox, self._events = trio.open_memory_channel[Event](_INBOX_EVENTS)
        self._pending: deque[Effect] = deque()
        self.finish: Finish | None = None
        self._scope = trio.CancelScope()
        self._is_over = trio.Event()

    def __repr__(self) -> str:
        return f"<driver of {self._machine!r}, {len(self._pending)} effects pending>"

    @property
    def drafter(self) -> str:
        """The name of the drafter in use, with its peer if that is another one."""
        return self._guesses.name

    def involves(self, peer: PeerId) -> bool:
        """Return True if `peer` is a stage of the present route; messages from other peers do not count."""
        return self._machine.involves(peer)

    async def run(self, output: trio.MemorySendChannel[Emit]) -> None:
        """Run the request; send committed tokens to `output`, then close it. Cancelling frees the stages' caches."""
        try:
            with self._scope, output:
                async with trio.open_nursery() as nursery:
                    self._pending.extend(self._machine.start(trio.current_time()))
                    while await self._perform(output, nursery):
                        self._guesses.look_around(self._machine.tokens, nursery)
                        event = await self._next_event()
                        effects = self._tell(event)
                        if self.checks is None:
                            self._pending.extend(effects)
                            continue
                        self._pending.extend(self.checks.heed(effects))
                        if not self._machine.is_finished:
                            self.checks.start_if_due(self._machine.tokens, nursery, self._checked)
                        await self.checks.wait_for_overdue()
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
        """End the request if it is still running, and wait until `run` has ended."""
        self._scope.cancel()
        await self._is_over.wait()

    async def _next_event(self) -> Event | None:
        with suppress(trio.WouldBlock):
            # An event that has arrived counts, even if a slow reader delayed us past the deadline.
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
                if self.checks is not None:
                    self.checks.ended()
                return [] if error is None else self._caught(error, self._machine.abort(error))
            case Lost(peer=peer) if not self.involves(peer):
                return []
            case Lost(peer=peer, reason=reason):
                return self._machine.lost(PeerDisconnected(f"lost stage {peer}: {reason}"), now_s, gone=peer)
            case Rerouted(route=route, error=error):
                if route is not None:
                    return self._machine.reopen(route, now_s)
                return self._machine.route_not_found(error or PeerDisconnected("no route"), now_s)

    def _hear(self, sender: PeerId, message: Verdict | Failure, now_s: float) -> Sequence[Effect]:
        if isinstance(message, Failure):
            error = error_of(message.kind, message.text)
            if message.peer:
                self._avoided.link(sender, message.peer, now_s)
            elif isinstance(error, PeerLeaving) or not isinstance(error, PeerDisconnected | PeerTimeout | PrefixLost):
                self._avoided.peer(sender, error, now_s)
            return self._machine.failed(message.epoch, error, now_s)
        if sender != self._machine.route.hops[-1].peer:
            # A late verdict of a route that this request has left, or a lie.
            if message.epoch < self._machine.opening.epoch:
                return []
            lie = RemoteProtocolError("verdict", f"one by {short_peer(sender)}", "verdicts of the route's tail only")
            self._avoided.peer(sender, lie, now_s)
            return self._machine.lost(lie, now_s)
        try:
            if self.checks is not None:
                self.checks.heard(message)
            effects = self._machine.receive(message, now_s)
        except (DishonestPeer, AuditIncomplete) as exc:
            # The lie was caught before its verdict was used, so nothing wrong was written.
            return self._caught(exc, self._machine.lost(exc, now_s))
        except RemoteProtocolError as exc:
            self._avoided.peer(sender, exc, now_s)
            return self._machine.lost(exc, now_s)
        if self._watch is not None:
            self._watch.verdict(message)
        return effects

    def _caught(self, error: PeerError, effects: Sequence[Effect]) -> Sequence[Effect]:
        if isinstance(error, DishonestPeer | AuditIncomplete) and error.peer:
            self._avoided.peer(PeerId(error.peer), error, trio.current_time())
            if self.checks is not None:
                self.checks.distrust(error)
        return effects

    async def _checked(self, error: PeerError | None) -> None:
        await self.inbox.send(Checked(error=error))

    async def _perform(self, output: trio.MemorySendChannel[Emit], nursery: trio.Nursery) -> bool:
        """Perform all pending effects; return False once the request is finished."""
        while self._pending:
            # Remove an effect only after it is done: a cancelled close message must be sent again.
            match self._pending[0]:
                case Send(message=CloseSession()) if self._owes_judgement():
                    await self._judge_whole()
                    continue
                case Send(to=to, message=message):
                    if self.checks is not None:
                        self.checks.follow(message, len(self._machine.tokens))
                    if isinstance(message, OpenSession):
                        signature = self._links.transport.sign(signed_opening(message))
                        message = msgspec.structs.replace(message, signature=signature)
                        if self._watch is not None:
                            self._watch.opened(message)
                    try:
                        await self._links.send(to, message)
                    except PeerError as exc:
                        # A stage that was to close the session may be gone; its session ends either way.
                        if not isinstance(message, CloseSession):
                            self._pending.extend(self._machine.lost(exc, trio.current_time()))
                case Emit() as emit:
                    self._committed(len(emit.tokens))
                    # A reader that leaves ends the request with `stop`; nobody needs the tokens until then.
                    with suppress(trio.BrokenResourceError):
                        await output.send(emit)
                case Draft() as draft if self._guesses.is_instant:
                    children = self._guesses.expand_now(draft)
                    self._pending.extend(self._machine.drafted(children, trio.current_time()))
                case Draft() as draft:
                    nursery.start_soon(self._draft, draft, nursery)
                case Carried():
                    # Only the auditor uses this.
                    pass
                case Replay(delay_s=delay_s, reason=reason):
                    logger.warning("route lost, replaying delay_s=%.2f reason=%s", delay_s, reason)
                    nursery.start_soon(self._reroute, delay_s)
                case Finish() as finish:
                    fault = self.checks.verdict() if self.checks is not None and finish.error is None else None
                    self.finish = finish if fault is None else Finish(reason="error", error=fault)
            self._pending.popleft()
        return self.finish is None

    def _owes_judgement(self) -> bool:
        """Return whether an audited answer is about to end well and was not judged. A route that is left is no end."""
        ends_well = any(isinstance(effect, Finish) and effect.error is None for effect in self._pending)
        return self.checks is not None and not self.checks.is_over and ends_well

    async def _judge_whole(self) -> None:
        """Check the rest of an audited answer, while its stages still hold their rows."""
        assert self.checks is not None, "it is audited"
        await self.checks.conclude(self._machine.tokens)
        if self.checks.fault is not None:
            self._caught(self.checks.fault, ())

    async def _draft(self, draft: Draft, nursery: trio.Nursery) -> None:
        children = await self._guesses.expand(draft, nursery)
        await self.inbox.send(Drafted(children=children))

    async def _reroute(self, delay_s: float) -> None:
        await trio.sleep(delay_s)
        detour = self._avoided.detour(self._machine.route, trio.current_time())
        try:
            result = Rerouted(route=await self._find_route(detour))
        except DsdError as exc:
            result = Rerouted(route=None, error=exc)
        await self.inbox.send(result)

    async def _close_stages(self) -> None:
        """Close the session at every stage, even when cancelled."""
        with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_TIMEOUT_S):
            for effect in [*self._pending, *self._machine.stop()]:
                if isinstance(effect, Send) and isinstance(effect.message, CloseSession):
                    with suppress(PeerError):
                        await self._links.send(effect.to, effect.message)

"""Simulates a target: a route of stages, each with a queue, batches and passes. The tail uses the live code's walk."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter
from typing import Protocol

import msgspec

from dsd_p2p.errors import DsdError
from dsd_p2p.netmodel import LinkModel, LinkState
from dsd_p2p.session.tail import TailWalk, verdict_of
from dsd_p2p.sim.answer import Answer
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.service import PassCost, Processor, Spread, spread
from dsd_p2p.types import StageCost, TokenId, UniformRng
from dsd_p2p.wire.messages import WAITED_PER_S, Verdict, Window

_WINDOW_BYTES, _NODE_BYTES = 40, 6


class Batching(StrEnum):
    """The rule that says which queued windows a pass takes."""

    FIFO = "fifo"
    LENGTH_AWARE = "length-aware"
    """The oldest window and those closest to it in length."""

    DEADLINE = "deadline"
    """The windows of the requests with the earliest deadlines."""


class Client(Protocol):
    """The request that a session belongs to."""

    @property
    def answer(self) -> Answer:
        """The request's text."""
        ...

    @property
    def deadline_s(self) -> float:
        """When the request should be finished."""
        ...

    def verdict(self, verdict: Verdict, session: "TargetSession") -> None:
        """Accept a verdict at the tail; it still has to travel to the coordinator."""
        ...

    def lost(self, error: DsdError, session: "TargetSession") -> None:
        """React to the loss of the session's target."""
        ...


@dataclass(slots=True, eq=False)
class TargetSession:
    """One request at one target, since one opening. cancelled_below: windows of earlier epochs are dropped."""

    client: Client
    target: "Target"
    walk: TailWalk
    cancelled_below: int = 0
    is_closed: bool = False


@dataclass(slots=True, eq=False)
class Flight:
    """A window on its way. hop: number of stages that it has passed. number: its place in the order of arrival."""

    session: TargetSession
    window: Window
    hop: int = 0
    number: int = 0
    queued_at_s: float = 0.0
    live: list[int] | None = None
    costs: list[StageCost] = field(default_factory=list)
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """The parameters of one stage.

    hidden_bytes: bytes of one position's hidden state on the way to the next stage.
    handling_s: work on the messages of each pass; the stage's own measurement leaves it out.
    """

    cost: PassCost
    spread: Spread = Spread.NONE
    max_batch: int = 1
    batching: Batching = Batching.FIFO
    hidden_bytes: int = 0
    handling_s: float = 0.0


class Stage:
    """One stage with its queue. Routes through the same layers of a peer share it.

    is_tail: the stage is the last of its routes. busy_s: time spent in passes. num_served: windows in these passes.
    queued_s: time that windows waited, added up over all windows.
    """

    def __init__(
        self, model: StageModel, clock: Clock, processor: Processor, rng: UniformRng, *, is_tail: bool = False
    ) -> None:
        self.model, self.is_tail = model, is_tail
        self._clock, self._processor, self._rng = clock, processor, rng
        self._queue: deque[Flight] = deque()
        self._is_busy = False
        self._num_arrived = 0
        self.busy_s = 0.0
        self.queued_s = 0.0
        self.num_served = 0
        self.num_passes = 0
        self.log: Callable[[float, float, list[Flight]], None] | None = None

    @property
    def num_waiting(self) -> int:
        """Windows in the queue."""
        return len(self._queue)

    def put(self, flight: Flight) -> None:
        """Queue a window."""
        flight.queued_at_s = self._clock.now_s
        flight.number = self._num_arrived = self._num_arrived + 1
        self._queue.append(flight)
        if not self._is_busy:
            self._start()

    def _start(self) -> None:
        batch = self._take()
        if not batch:
            return
        self._is_busy = True
        now_s = self._clock.now_s
        num_nodes = context = 0
        for flight in batch:
            self.queued_s += now_s - flight.queued_at_s
            num_nodes += len(flight.window.tokens if flight.live is None else flight.live)
            context += flight.window.positions[0]
        seconds = spread(self.model.cost.at(num_nodes, len(batch), context), self.model.spread, self._rng)
        self.num_passes += 1
        handling_s = self.model.handling_s
        share = seconds / (seconds + handling_s) if handling_s else 1.0
        self._processor.run(seconds + handling_s, self._done, batch, num_nodes, share, now_s)

    def _take(self) -> list[Flight]:
        """Take the windows of the next pass out of the queue.

        A session has at most one among them, its oldest, because what its next window is worth depends on it.
        """
        heads: dict[TargetSession, Flight] = {}
        rest: list[Flight] = []
        is_fifo = self.model.batching is Batching.FIFO
        while self._queue and not (is_fifo and len(heads) == self.model.max_batch):
            flight = self._queue.popleft()
            if flight.session in heads:
                rest.append(flight)
            elif self._is_wanted(flight):
                heads[flight.session] = flight
        batch = list(heads.values())
        if len(batch) > self.model.max_batch:
            batch.sort(key=self._order(batch[0]))
            rest += batch[self.model.max_batch :]
            rest.sort(key=attrgetter("number"))
            batch = batch[: self.model.max_batch]
        self._queue.extendleft(reversed(rest))
        return batch

    def _order(self, oldest: Flight) -> Callable[[Flight], tuple[float, int]]:
        if self.model.batching is Batching.DEADLINE:
            return lambda flight: (flight.session.client.deadline_s, flight.number)
        size = len(oldest.window.tokens)
        return lambda flight: (abs(len(flight.window.tokens) - size), flight.number)

    def _is_wanted(self, flight: Flight) -> bool:
        session, window = flight.session, flight.window
        if session.is_closed or window.epoch < session.cancelled_below:
            return False
        if self.is_tail:
            flight.live = session.walk.live(window)
            return bool(flight.live)
        return True

    def _done(self, batch: list[Flight], num_nodes: int, share: float, started_s: float) -> None:
        seconds = self._clock.now_s - started_s
        self.busy_s += seconds
        self.num_served += len(batch)
        us, num_sessions = max(0, round(seconds * share * 1e6)), len(batch)
        if self.log is not None:
            self.log(started_s, self._clock.now_s, batch)
        for flight in batch:
            flight.waited_s += started_s - flight.queued_at_s
            flight.costs.append(StageCost(us=us, num_rows=num_nodes, num_sessions=num_sessions))
            flight.session.target.passed(flight)
        # A window that arrives at this very moment is in time for the next pass.
        self._clock.deadline(0.0, self._go_on)

    def _go_on(self) -> None:
        self._is_busy = False
        if self._queue:
            self._start()


class Target:
    """A route of stages that serves many sessions. links: the link after each stage but the last."""

    def __init__(
        self, name: str, stages: Sequence[Stage], links: Sequence[LinkModel], clock: Clock, rng: UniformRng
    ) -> None:
        self.name, self.stages = name, stages
        self._clock, self._rng = clock, rng
        self._links = [LinkState(link) for link in links]
        self.sessions: dict[TargetSession, None] = {}
        self.is_up = True

    def open(self, client: Client, epoch: int, num_prompt: int, num_given: int) -> TargetSession:
        """Start a session, so that windows sent to it find it when they arrive."""
        session = TargetSession(client, self, TailWalk(epoch=epoch, num_prompt=num_prompt, num_given=num_given))
        self.sessions[session] = None
        return session

    def close(self, session: TargetSession) -> None:
        """Forget a session."""
        session.is_closed = True
        self.sessions.pop(session, None)

    def put(self, session: TargetSession, window: Window) -> None:
        """Queue a window that has arrived at the head."""
        if self.is_up and not session.is_closed:
            self.stages[0].put(Flight(session, window))

    def fail(self) -> list[TargetSession]:
        """Go down and lose everything here; return the sessions that were open."""
        self.is_up = False
        lost = list(self.sessions)
        for session in lost:
            session.is_closed = True
        self.sessions.clear()
        return lost

    def passed(self, flight: Flight) -> None:
        """Send a window on after a stage's pass, or commit its tokens after the tail's."""
        if flight.hop == len(self._links):
            self._commit(flight)
            return
        now_s = self._clock.now_s
        num_nodes, hidden_bytes = len(flight.window.tokens), self.stages[flight.hop].model.hidden_bytes
        num_bytes = _WINDOW_BYTES + num_nodes * (_NODE_BYTES + hidden_bytes)
        arrival_s = self._links[flight.hop].send(now_s=now_s, num_bytes=num_bytes, rng=self._rng)
        flight.hop += 1
        self._clock.after(arrival_s - now_s, self._arrive, flight)

    def _arrive(self, flight: Flight) -> None:
        if self.is_up and not flight.session.is_closed:
            self.stages[flight.hop].put(flight)

    def _commit(self, flight: Flight) -> None:
        session, window, live = flight.session, flight.window, flight.live
        if session.is_closed or live is None:
            return
        answer, positions = session.client.answer, window.positions

        def pick(row: int) -> TokenId:
            return answer.pick(positions[live[row]])

        committed = session.walk.walk(window, live, pick, written=lambda _token: None)
        if committed.tokens:
            waited = round(flight.waited_s * WAITED_PER_S)
            measured = msgspec.structs.replace(window, costs=tuple(flight.costs), waited=waited)
            session.client.verdict(verdict_of(measured, committed, num_live=len(live)), session)


def window_bytes(window: Window) -> int:
    """Return the approximate size in bytes of a window on its way to the head."""
    return _WINDOW_BYTES + _NODE_BYTES * len(window.tokens)

"""Emits the events of one request, live or simulated: both run the same `RequestMachine` and emit the same events."""

import hashlib
from collections.abc import Callable, Sequence

from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.telemetry.events import (
    DecisionMade,
    Event,
    RateOf,
    Replayed,
    SessionEnded,
    SessionStarted,
    StageOf,
    WindowVerified,
)
from dsd_p2p.window.learned.features import features
from dsd_p2p.wire.messages import Hop, OpenSession, Verdict

Sink = Callable[[Event], None]
"""Takes an event and returns at once, without waiting for its delivery."""

_INTERVAL_S = 0.1
"""Minimum time between two window events of a request; the next event's totals include the skipped windows."""


def _name_of(session: bytes) -> str:
    """Return what tells sessions apart. The id itself stays between the peers of the session."""
    return hashlib.blake2b(session, digest_size=8).hexdigest()


class RequestWatch:
    """The observer of one `RequestMachine`. now: returns the events' time in seconds. drafter: who drafts now."""

    def __init__(
        self, machine: RequestMachine, sink: Sink, now: Callable[[], float], drafter: Callable[[], str]
    ) -> None:
        self._machine = machine
        self._sink = sink
        self._now = now
        self._drafter = drafter
        self._session = ""
        self._coordinator = ""
        self._started_at_s = now()
        self._first_at_s: float | None = None
        self._told_at_s = 0.0
        self._stage_us: tuple[int, ...] = ()
        self._decision = ""
        self._num_replays = 0
        self._is_ended = False

    def opened(self, message: OpenSession) -> None:
        """Report that a route was opened: the first one or a replay."""
        now_s, stages = self._now(), _stages(message.route)
        num_tokens = len(self._machine.tokens) - len(self._machine.request.prompt)
        if self._session:
            # If a stage no longer holds the parked text, the route is opened a second time. That is no replay.
            if self._machine.stats.num_replays == self._num_replays:
                return
            self._num_replays = self._machine.stats.num_replays
            self._sink(
                Replayed(
                    at_s=now_s,
                    session=self._session,
                    coordinator=self._coordinator,
                    stages=stages,
                    num_tokens=num_tokens,
                )
            )
            return
        self._session, self._coordinator = _name_of(message.session), message.coordinator.peer
        self._sink(
            SessionStarted(
                at_s=now_s,
                session=self._session,
                coordinator=self._coordinator,
                stages=stages,
                num_prompt_tokens=len(self._machine.request.prompt),
                max_tokens=message.max_length - len(self._machine.request.prompt),
                drafter=self._drafter(),
                verification="relaxed" if self._machine.request.is_relaxed else "exact",
            )
        )

    def verdict(self, verdict: Verdict) -> None:
        """Report, after the machine handled a verdict, a changed decision and, at intervals, the window."""
        now_s, machine = self._now(), self._machine
        num_tokens = len(machine.tokens) - len(machine.request.prompt)
        if self._first_at_s is None and num_tokens:
            self._first_at_s = now_s
        self._stage_us = tuple(cost.us for cost in verdict.costs)
        if not self._session:
            return
        if machine.decision.kind != self._decision:
            self._tell_decision(now_s)
        if now_s - self._told_at_s >= _INTERVAL_S:
            self._tell_window(now_s)

    def _tell_decision(self, now_s: float) -> None:
        decision, observation = self._machine.decision, self._machine.pacing.observe()
        if not observation.stages:
            return
        self._decision = decision.kind
        measured = observation.measured
        self._sink(
            DecisionMade(
                at_s=now_s,
                session=self._session,
                coordinator=self._coordinator,
                decision=decision.kind,
                reason=decision.reason,
                features=tuple(round(float(value), 5) for value in features(observation, decision)),
                measured=tuple(
                    RateOf(kind=kind, tokens_per_s=rate.tokens_per_s, num_tokens=rate.num_tokens)
                    for kind, rate in measured.items()
                ),
            )
        )

    def _tell_window(self, now_s: float) -> None:
        self._told_at_s = now_s
        machine = self._machine
        num_tokens = len(machine.tokens) - len(machine.request.prompt)
        stats, decision = machine.stats, machine.decision
        self._sink(
            WindowVerified(
                at_s=now_s,
                session=self._session,
                coordinator=self._coordinator,
                mode=decision.mode,
                drafter=self._drafter(),
                decision=decision.kind,
                reason=decision.reason,
                num_tokens=num_tokens,
                num_windows=stats.num_windows,
                num_nodes=stats.num_nodes_sent,
                num_misses=stats.num_misses,
                num_stale=stats.num_stale_nodes,
                num_relaxed=stats.num_relaxed_tokens,
                num_in_flight=len(machine.flight),
                traversal_s=machine.flight.traversal_s,
                stage_us=self._stage_us,
                hits_by_depth=tuple(stats.hits_by_depth),
                outcomes_by_depth=tuple(stats.outcomes_by_depth),
            )
        )

    def ended(self, reason: str, error: str = "") -> None:
        """Report the end of the request, once."""
        if self._is_ended or not self._session:
            return
        self._is_ended = True
        now_s, machine = self._now(), self._machine
        # The last totals include the windows skipped since the last event.
        self._tell_window(now_s)
        self._tell_decision(now_s)
        self._sink(
            SessionEnded(
                at_s=now_s,
                session=self._session,
                coordinator=self._coordinator,
                reason=reason,
                error=error[:1024],
                num_tokens=len(machine.tokens) - len(machine.request.prompt),
                ttft_s=0.0 if self._first_at_s is None else self._first_at_s - self._started_at_s,
                total_s=now_s - self._started_at_s,
                num_replays=machine.stats.num_replays,
            )
        )


def _stages(route: Sequence[Hop]) -> tuple[StageOf, ...]:
    return tuple(StageOf(peer=hop.peer, first=hop.span.first, last=hop.span.last) for hop in route)

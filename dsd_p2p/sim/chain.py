"""One request on one chain in virtual time: the live coordinator machine and tail walk, service times for everything else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
import simpy

from dsd_p2p.session.coordinator import Coordinator
from dsd_p2p.session.effects import Candidate, Draft, Effect, Emit, Finish, Send
from dsd_p2p.session.request import Request, RequestStats, Route
from dsd_p2p.session.tail import TailWalk, verdict_of
from dsd_p2p.sim.recorded import RecordedDrafts, recorded_pick
from dsd_p2p.sim.trace import AgreementTrace
from dsd_p2p.types import SessionId, Span, TokenId
from dsd_p2p.window.base import CostLine, WindowPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import Cancel, Hop, Verdict, Window

_DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainModel:
    """What the chain costs, seconds.

    stages: compute of one pass over n nodes, one line a stage. link_s: one-way latency of each of the `len(stages) + 1` links.
    draft: one draft step that expands n stems.
    """

    stages: tuple[CostLine, ...]
    link_s: float
    draft: CostLine


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """How it went; arrivals are (seconds, tokens) since the start."""

    tokens: list[TokenId]
    arrivals: list[tuple[float, int]]
    stats: RequestStats

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first arrival, as the live benchmark counts."""
        (first_s, first_size), (last_s, _) = self.arrivals[0], self.arrivals[-1]
        return (len(self.tokens) - first_size) / (last_s - first_s)


class Drafts(Protocol):
    """What a drafter would say; how long it takes is the chain model's."""

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return each stem's children, likeliest first."""
        ...


class _NoRng:
    def random(self) -> float:
        return 0.5


class _Stage:
    """A stage's queue and pass; the tail also walks."""

    def __init__(
        self,
        env: simpy.Environment,
        cost: CostLine,
        deliver: Callable[[Window | Verdict], None],
        walk: TailWalk | None,
        pick: Callable[[int], TokenId],
    ) -> None:
        self._env, self._cost, self._deliver, self._walk, self._pick = env, cost, deliver, walk, pick
        self.queue: simpy.Store = simpy.Store(env)
        self.cancelled_below = 0

    def run(self) -> simpy.events.ProcessGenerator:
        while True:
            window: Window = yield self.queue.get()
            if window.epoch < self.cancelled_below:
                continue
            live = self._walk.live(window) if self._walk else list(range(len(window.tokens)))
            if not live:
                continue
            seconds = self._cost.at(len(live))
            yield self._env.timeout(seconds)
            window = msgspec.structs.replace(window, stage_us=(*window.stage_us, round(seconds * 1e6)))
            if self._walk is None:
                self._deliver(window)
                continue
            committed = self._walk.walk(window, live, partial(self._pick_after, window, live))
            if committed.tokens:
                self._deliver(verdict_of(window, committed, num_live=len(live)))

    def _pick_after(self, window: Window, live: Sequence[int], row: int) -> TokenId:
        return self._pick(window.positions[live[row]])


class _Run:
    """What `dsd_p2p.pipeline.driver` and the stage servers do, on SimPy's clock."""

    def __init__(self, machine: Coordinator, chain: ChainModel, drafts: Drafts, pick: Callable[[int], TokenId]) -> None:
        self._machine, self._chain, self._drafts = machine, chain, drafts
        self._env = simpy.Environment()
        self._finished = self._env.event()
        self.tokens: list[TokenId] = []
        self.arrivals: list[tuple[float, int]] = []
        last = len(chain.stages) - 1
        self._stages = [
            _Stage(
                self._env,
                cost,
                partial(self._deliver, index + 1),
                TailWalk(epoch=0, num_given=1) if index == last else None,
                pick,
            )
            for index, cost in enumerate(chain.stages)
        ]

    def until_finished(self) -> None:
        for stage in self._stages:
            self._env.process(stage.run())
        self._perform(self._machine.start(0.0))
        self._env.run(until=self._env.any_of([self._finished, self._env.timeout(_DEADLINE_S)]))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(message=Window() as window):
                    self._deliver(0, window)
                case Send(message=Cancel(epoch=epoch)):
                    self._after(self._chain.link_s, partial(self._cancel, epoch))
                case Draft() as draft:
                    children = self._drafts.expand(draft)
                    self._after(self._chain.draft.at(len(draft.stems)), partial(self._drafted, children))
                case Emit(tokens=tokens):
                    self.tokens.extend(tokens)
                    self.arrivals.append((self._env.now, len(tokens)))
                case Finish():
                    self._finished.succeed()
                case _:
                    pass
        if self._env.now <= self._machine.deadline_s < _DEADLINE_S:
            self._after(self._machine.deadline_s - self._env.now, self._wake)

    def _deliver(self, stage: int, message: Window | Verdict) -> None:
        if isinstance(message, Verdict):
            self._after(self._chain.link_s, partial(self._received, message))
        else:
            self._after(self._chain.link_s, partial(self._stages[stage].queue.put, message))

    def _received(self, verdict: Verdict) -> None:
        self._perform(self._machine.receive(verdict, self._env.now))

    def _drafted(self, children: list[list[Candidate]]) -> None:
        self._perform(self._machine.drafted(children, self._env.now))

    def _wake(self) -> None:
        if self._machine.deadline_s <= self._env.now:
            self._perform(self._machine.wake(self._env.now))

    def _cancel(self, epoch: int) -> None:
        for stage in self._stages:
            stage.cancelled_below = max(stage.cancelled_below, epoch)

    def _after(self, delay_s: float, action: Callable[[], object]) -> None:
        self._env.timeout(delay_s).callbacks.append(lambda _: action())


def simulate_request(
    trace: AgreementTrace,
    text: int,
    chain: ChainModel,
    policy: WindowPolicy,
    tracker: Tracker,
    max_tokens: int,
    drafts: Drafts | None = None,
) -> SimulatedRequest:
    """Write `max_tokens` of text number `text`; without `drafts` the recorded drafter's."""
    hop = Hop(peer="sim", address="", span=Span(0, 1))
    request = Request(
        session=SessionId(bytes(8)),
        prompt=[text],
        max_tokens=min(max_tokens, len(trace.texts[text].tokens)),
        vocab_size=trace.vocab_size,
        stall_timeout_s=_DEADLINE_S,
    )
    route = Route(hops=(hop,) * len(chain.stages), coordinator=hop, model_digest="", dtype="")
    machine = Coordinator(request, route, policy, tracker, _NoRng())
    run = _Run(machine, chain, drafts or RecordedDrafts(trace), partial(recorded_pick, trace, text))
    run.until_finished()
    return SimulatedRequest(tokens=run.tokens, arrivals=run.arrivals, stats=machine.stats)

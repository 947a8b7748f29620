"""One request on one chain in virtual time: the live coordinator machine and tail walk, service times for everything else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
import simpy

from dsd_p2p.session.coordinator import Coordinator
from dsd_p2p.session.effects import Candidate, Draft, Effect, Emit, Finish, Send
from dsd_p2p.session.request import Request, RequestStats, Route
from dsd_p2p.session.tail import TailWalk
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
        self.env, self.cost, self.deliver, self.walk, self.pick = env, cost, deliver, walk, pick
        self.queue: simpy.Store = simpy.Store(env)
        self.cancelled_below = 0

    def run(self) -> simpy.events.ProcessGenerator:
        while True:
            window = yield self.queue.get()
            if window.epoch < self.cancelled_below:
                continue
            live = self.walk.live(window) if self.walk else range(len(window.tokens))
            if len(live) == 0:
                continue
            seconds = self.cost.at(len(live))
            yield self.env.timeout(seconds)
            measured = (*window.stage_us, round(seconds * 1e6))
            if self.walk is None:
                self.deliver(msgspec.structs.replace(window, stage_us=measured))
                continue
            committed = self.walk.walk(
                window,
                list(live),
                lambda row: self.pick(window.positions[live[row]]),  # noqa: B023 - called at once
            )
            if committed.tokens:
                self.deliver(
                    Verdict(
                        session=window.session,
                        epoch=window.epoch,
                        window=window.window,
                        start_pos=committed.start_pos,
                        tokens=tuple(committed.tokens),
                        settled=tuple(committed.settled),
                        num_live=len(live),
                        num_stale=len(window.tokens) - len(live),
                        stage_us=measured,
                    )
                )


def simulate_request(
    trace: AgreementTrace,
    text: int,
    chain: ChainModel,
    policy: WindowPolicy,
    tracker: Tracker,
    max_tokens: int,
    drafts: RecordedDrafts | None = None,
) -> SimulatedRequest:
    """Write `max_tokens` of text number `text`; the driver of `dsd_p2p.pipeline.driver` on SimPy's clock."""
    env = simpy.Environment()
    drafts = drafts or RecordedDrafts(trace)
    num_stages = len(chain.stages)
    hop = Hop(peer="sim", address="", span=Span(0, 1))
    request = Request(
        session=SessionId(bytes(8)),
        prompt=[text],
        max_tokens=min(max_tokens, len(trace.texts[text].tokens)),
        vocab_size=trace.vocab_size,
        stall_timeout_s=_DEADLINE_S,
    )
    machine = Coordinator(
        request,
        Route(hops=(hop,) * num_stages, coordinator=hop, model_digest="", dtype=""),
        policy,
        tracker,
        _NoRng(),
    )
    tokens: list[TokenId] = []
    arrivals: list[tuple[float, int]] = []
    finished = env.event()

    def after(delay_s: float, action: Callable[[], object]) -> None:
        env.timeout(delay_s).callbacks.append(lambda _: action())

    def perform(effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(message=Window() as window):
                    after(chain.link_s, partial(stages[0].queue.put, window))
                case Send(message=Cancel(epoch=epoch)):
                    after(chain.link_s, partial(cancel, epoch))
                case Draft() as draft:
                    after(chain.draft.at(len(draft.stems)), partial(drafted, drafts.expand(draft)))
                case Emit(tokens=emitted):
                    tokens.extend(emitted)
                    arrivals.append((env.now, len(emitted)))
                case Finish():
                    if not finished.triggered:
                        finished.succeed()
                case _:
                    pass
        wake_at_s = machine.deadline_s
        if env.now <= wake_at_s < _DEADLINE_S:
            after(
                wake_at_s - env.now, lambda: perform(machine.wake(env.now)) if machine.deadline_s <= env.now else None
            )

    def drafted(children: list[list[Candidate]]) -> None:
        perform(machine.drafted(children, env.now))

    def cancel(epoch: int) -> None:
        for stage in stages:
            stage.cancelled_below = max(stage.cancelled_below, epoch)

    def deliver_from(index: int) -> Callable[[Window | Verdict], None]:
        def deliver(message: Window | Verdict) -> None:
            if isinstance(message, Verdict):
                after(chain.link_s, lambda: perform(machine.receive(message, env.now)))
            else:
                after(chain.link_s, lambda: stages[index + 1].queue.put(message))

        return deliver

    stages = [
        _Stage(
            env,
            cost,
            deliver_from(index),
            TailWalk(epoch=0, num_given=1) if index == num_stages - 1 else None,
            lambda position: recorded_pick(trace, text, position),
        )
        for index, cost in enumerate(chain.stages)
    ]
    for stage in stages:
        env.process(stage.run())
    perform(machine.start(0.0))
    env.run(until=env.any_of([finished, env.timeout(_DEADLINE_S)]))
    return SimulatedRequest(tokens=tokens, arrivals=arrivals, stats=machine.stats)

"""Runs a scenario: builds its machines, lets requests arrive, keeps what happened."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from dsd_p2p.errors import ConfigError, PeerDisconnected
from dsd_p2p.netmodel import LinkModel, LinkState
from dsd_p2p.placement.balance import Balancer, Load
from dsd_p2p.session.coordinator import Coordinator
from dsd_p2p.session.request import Request, Route
from dsd_p2p.sim.answer import Answer, ParametricAnswer, RecordedAnswer
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.request import DraftDevice, Path, RequestLog, RequestRun
from dsd_p2p.sim.scenario import DrafterPool, Scenario, TargetPool
from dsd_p2p.sim.service import Dedicated, Processor, SharedCores
from dsd_p2p.sim.target import StageModel, Target
from dsd_p2p.sim.trace import AgreementTrace
from dsd_p2p.sim.workload import Arrival, arrivals
from dsd_p2p.telemetry.events import PeerStatus
from dsd_p2p.telemetry.watch import RequestWatch, Sink
from dsd_p2p.types import SessionId, Span
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import MAX_TOKEN, Hop

PolicyOf = Callable[[], WindowPolicy]

_STATUS_S = 1.0
"""Between two words of a stage, as live ones have it."""


@dataclass(slots=True)
class StageReport:
    """One stage over the whole run. mean_queue: windows that wait, in the time's mean."""

    target: str
    stage: int
    busy_share: float
    mean_queue: float
    num_served: int
    num_passes: int


@dataclass(slots=True)
class FleetRun:
    """What happened. logs: of the requests that ended, in that order. mean_under_way: requests, in the time's mean.

    passes: when recorded, as (target, stage, start, end, windows, nodes).
    """

    scenario: Scenario
    duration_s: float
    logs: list[RequestLog]
    stages: list[StageReport]
    mean_under_way: float
    num_leaked: int
    num_unfinished: int
    passes: list[tuple[str, int, float, float, int, int]] = field(default_factory=list)


class _Drafter:
    """A machine that drafts and asks."""

    __slots__ = ("device", "links", "peer", "pool", "trackers")

    def __init__(self, index: int, pool: DrafterPool, device: DraftDevice) -> None:
        self.pool, self.device = pool, device
        self.peer = f"drafter-{index}"
        self.links: dict[int, Path] = {}
        self.trackers: dict[str, Tracker] = {}


class Fleet:
    """A scenario at work. Call `run` once.

    policy_of: makes the window policy of one request. trace: recorded answers, instead of parametric ones.
    is_recording: keep every request's arrivals and every pass, for a timeline. tell: is told what a live swarm's telemetry tells.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy_of: PolicyOf,
        trace: AgreementTrace | None = None,
        *,
        is_recording: bool = False,
        progress: Callable[[int, float], None] | None = None,
        tell: Sink | None = None,
    ) -> None:
        self._scenario, self._policy_of, self._trace = scenario, policy_of, trace
        self._is_recording, self._progress, self._tell = is_recording, progress, tell
        self._busy_s: dict[tuple[str, int], float] = {}
        self.clock = Clock()
        # One source each: a change of the links leaves the texts and arrivals as they are.
        self._rng = {
            name: random.Random(f"{scenario.seed} {name}")  # noqa: S311 - a simulation
            for name in ("arrivals", "links", "service", "routing", "texts", "churn", "retries")
        }
        self._balancer = Balancer(scenario.speculation.routing, self._rng["routing"])
        self._targets: list[Target] = []
        self._target_devices: list[DraftDevice | None] = []
        self._window_s: list[float] = []
        for pool in scenario.targets:
            for _ in range(pool.count):
                self._add_target(pool)
        self._link_models = {name: link.models() for name, link in scenario.links.items()}
        self._drafters = [
            self._new_drafter(pool, index)
            for index, pool in enumerate(pool for pool in scenario.drafters for _ in range(pool.count))
        ]
        self._num_requests: Counter[str] = Counter()
        self._texts = self._suitable_texts()
        self._source: Iterator[Arrival] = iter(())
        self._has_more = True
        self._ended_s = 0.0
        self._num_started = 0
        self._num_ended = 0
        self._under_way_s = 0.0
        self._changed_s = 0.0
        self._logs: list[RequestLog] = []
        self._passes: list[tuple[str, int, float, float, int, int]] = []

    @property
    def trackers(self) -> list[Tracker]:
        """What each drafter has measured of each target."""
        return [tracker for drafter in self._drafters for tracker in drafter.trackers.values()]

    # Building

    def _add_target(self, pool: TargetPool) -> None:
        name = f"target-{len(self._targets)}"
        cost = pool.stage.pass_cost()
        inner = self._scenario.links[pool.inner_link].models()[0] if pool.inner_link else LinkModel()
        model = StageModel(
            cost=cost,
            link=inner,
            spread=pool.spread,
            max_batch=pool.max_batch,
            batching=pool.batching,
            hidden_bytes=pool.hidden_bytes,
        )
        shared = SharedCores(self.clock, pool.cores) if pool.cores else None
        processors: list[Processor] = [shared.user() if shared else Dedicated(self.clock) for _ in range(pool.stages)]
        target = Target(name, [model] * pool.stages, self.clock, processors, self._rng["service"])
        if self._is_recording:
            for stage in target.stages:
                stage.log = lambda index, start_s, end_s, batch, name=name: self._passes.append(
                    (name, index, start_s, end_s, len(batch), sum(len(flight.window.tokens) for flight in batch))
                )
        self._targets.append(target)
        step = pool.draft_step
        self._target_devices.append(DraftDevice(step.pass_cost(), Dedicated(self.clock)) if step is not None else None)
        self._window_s.append(cost.at(self._scenario.speculation.depth + 1) / pool.max_batch)

    def _new_drafter(self, pool: DrafterPool, index: int) -> _Drafter:
        return _Drafter(index, pool, DraftDevice(pool.step.pass_cost(), Dedicated(self.clock)))

    def _suitable_texts(self) -> list[int]:
        if self._trace is None:
            return []
        category = self._scenario.acceptance.category
        texts = [index for index, text in enumerate(self._trace.texts) if category in ("", text.category)]
        if not texts:
            known = ", ".join(sorted({text.category for text in self._trace.texts}))
            raise ConfigError(f"acceptance.category is {category!r}: the trace has {known}")
        return texts

    # Routing

    def _choose_path(self, drafter: _Drafter) -> Path | None:
        """Return the way from a drafter to the target that the balancer chooses."""
        up = [index for index, target in enumerate(self._targets) if target.is_up]
        if not up:
            return None
        round_trip_s = sum(model.latency_s for model in self._link_models[drafter.pool.link])
        loads = [
            Load(self._num_requests[self._targets[index].name], self._window_s[index], round_trip_s) for index in up
        ]
        return self._path(drafter, up[self._balancer.choose(loads)])

    def _path(self, drafter: _Drafter, index: int) -> Path:
        path = drafter.links.get(index)
        if path is None:
            there, back = self._link_models[drafter.pool.link]
            target = self._targets[index]
            hops = tuple(
                Hop(peer=f"{target.name}/{stage}", address="", span=Span(stage, stage + 1))
                for stage in range(len(target.stages))
            )
            route = Route(
                hops=hops,
                coordinator=Hop(peer=drafter.peer, address="", span=Span(0, 1)),
                model_digest="",
                dtype="",
            )
            is_at_target = self._scenario.speculation.placement == "target"
            device = self._target_devices[index] if is_at_target else None
            path = drafter.links[index] = Path(target, LinkState(there), LinkState(back), route, device)
        return path

    # Requests

    def run(self) -> FleetRun:
        """Go through the whole workload, or to the horizon."""
        workload = self._scenario.workload
        self._source = arrivals(workload, self._rng["arrivals"])
        if workload.arrivals == "closed":
            for number in range(min(workload.concurrency, workload.requests)):
                self._next_closed(self._drafters[number % len(self._drafters)])
        else:
            self._next_open()
        if self._tell is not None:
            self.clock.after(_STATUS_S, self._tell_stages, self._tell)
        if self._scenario.churn.up:
            for target in self._targets:
                self._schedule_failure(target)
        self.clock.run(self._scenario.horizon)
        if self._num_started > self._num_ended:
            self._ended_s = self.clock.now_s
            self._count_under_way()
        duration_s = max(self._ended_s, 1e-12)
        return FleetRun(
            scenario=self._scenario,
            duration_s=duration_s,
            logs=self._logs,
            stages=[
                self._stage_report(target, index) for target in self._targets for index in range(len(target.stages))
            ],
            mean_under_way=self._under_way_s / duration_s,
            num_leaked=sum(len(target.sessions) for target in self._targets)
            if self._num_ended == self._num_started
            else 0,
            num_unfinished=self._num_started - self._num_ended,
            passes=self._passes,
        )

    def _stage_report(self, target: Target, index: int) -> StageReport:
        stage, duration_s = target.stages[index], max(self._ended_s, 1e-12)
        return StageReport(
            target=target.name,
            stage=index,
            busy_share=stage.busy_s / duration_s,
            mean_queue=stage.queued_s / duration_s,
            num_served=stage.num_served,
            num_passes=stage.num_passes,
        )

    def _tell_stages(self, tell: Sink) -> None:
        """How each stage is, as a live one says it."""
        for target in self._targets:
            for index, stage in enumerate(target.stages):
                name = (target.name, index)
                busy_s = stage.busy_s - self._busy_s.get(name, 0.0)
                self._busy_s[name] = stage.busy_s
                tell(
                    PeerStatus(
                        at_s=self.clock.now_s,
                        peer=f"{target.name}/{index}",
                        is_online=target.is_up,
                        roles=("stage",),
                        model="simulated",
                        first=index,
                        last=index + 1,
                        num_layers=len(target.stages),
                        state="serving" if target.is_up else "down",
                        num_sessions=len(target.sessions),
                        queue=stage.num_waiting,
                        busy_share=max(0.0, min(1.0, busy_s / _STATUS_S)),
                        num_passes=stage.num_passes,
                        num_windows=stage.num_served,
                    )
                )
        if not self._is_over():
            self.clock.after(_STATUS_S, self._tell_stages, tell)

    def _next_arrival(self) -> Arrival | None:
        arrival = next(self._source, None)
        self._has_more = arrival is not None
        return arrival

    def _next_open(self) -> None:
        if (arrival := self._next_arrival()) is not None:
            self.clock.after(arrival.arrived_s - self.clock.now_s, self._arrive_open, arrival)

    def _arrive_open(self, arrival: Arrival) -> None:
        self._start(arrival, self._drafters[self._num_started % len(self._drafters)])
        self._next_open()

    def _next_closed(self, drafter: _Drafter) -> None:
        if (arrival := self._next_arrival()) is not None:
            self._start(arrival, drafter)

    def _start(self, arrival: Arrival, drafter: _Drafter) -> None:
        self._count_under_way()
        number = self._num_started
        self._num_started += 1
        # Where none is up a drafter tries one, and finds out.
        path = self._choose_path(drafter) or self._path(drafter, 0)
        scenario, speculation = self._scenario, self._scenario.speculation
        log = RequestLog(
            number,
            self.clock.now_s,
            arrival.num_prompt_tokens,
            arrivals=[] if self._is_recording else None,
        )
        trackers = drafter.trackers if speculation.remembers else {}
        tracker = trackers.setdefault(path.target.name, Tracker())
        answer, num_answer_tokens = self._answer(number, arrival)
        request = Request(
            session=SessionId(number.to_bytes(8, "little")),
            prompt=[0] * arrival.num_prompt_tokens,
            max_tokens=num_answer_tokens,
            vocab_size=MAX_TOKEN,
            prefill_chunk=speculation.prefill_chunk,
            stall_timeout_s=float("inf"),
        )
        machine = Coordinator(request, path.route, self._policy_of(), tracker, self._rng["retries"])
        run = RequestRun(
            machine=machine,
            answer=answer,
            device=drafter.device,
            choose_path=partial(self._choose_path, drafter),
            clock=self.clock,
            rng=self._rng["links"],
            log=log,
            deadline_s=self.clock.now_s + scenario.workload.slo_ttft + num_answer_tokens * scenario.workload.slo_tpot,
            notice_s=scenario.churn.notice,
            is_fusing=speculation.mode == "auto",
            is_at_target=speculation.placement == "target" or speculation.mode == "fused",
            finished=partial(self._ended, drafter),
            moved=self._moved,
            told=self._watch_of(machine),
        )
        run.start(path)

    def _watch_of(self, machine: Coordinator) -> RequestWatch | None:
        if self._tell is None:
            return None
        return RequestWatch(machine, self._tell, lambda: self.clock.now_s, "simulated")

    def _answer(self, number: int, arrival: Arrival) -> tuple[Answer, int]:
        if self._trace is None:
            seed = self._rng["texts"].getrandbits(48)
            return ParametricAnswer(self._scenario.acceptance.agreement(), seed), arrival.num_answer_tokens
        text = self._trace.texts[self._texts[number % len(self._texts)]]
        return RecordedAnswer(text, arrival.num_prompt_tokens, self._trace.vocab_size), arrival.num_answer_tokens

    def _moved(self, before: Target | None, after: Target | None) -> None:
        """A request leaves one target's load for another's."""
        for target, change in ((before, -1), (after, 1)):
            if target is not None:
                self._num_requests[target.name] += change

    def _ended(self, drafter: _Drafter, run: RequestRun) -> None:
        self._count_under_way()
        self._num_ended += 1
        self._ended_s = self.clock.now_s
        self._logs.append(run.log)
        if self._progress is not None and self._num_ended % 1000 == 0:
            self._progress(self._num_ended, self.clock.now_s)
        workload = self._scenario.workload
        if workload.arrivals == "closed":
            self.clock.after(workload.think, self._next_closed, drafter)

    def _count_under_way(self) -> None:
        now_s = self.clock.now_s
        self._under_way_s += (self._num_started - self._num_ended) * (now_s - self._changed_s)
        self._changed_s = now_s

    # Churn

    def _schedule_failure(self, target: Target) -> None:
        self.clock.after(self._rng["churn"].expovariate(1 / self._scenario.churn.up), self._fail, target)

    def _fail(self, target: Target) -> None:
        if self._is_over():
            return
        churn = self._scenario.churn
        for session in target.fail():
            error = PeerDisconnected(f"{target.name} is down")
            self.clock.after(churn.notice, session.client.lost, error, session)
        self.clock.after(self._rng["churn"].expovariate(1 / churn.down), self._recover, target)

    def _recover(self, target: Target) -> None:
        target.is_up = True
        if not self._is_over():
            self._schedule_failure(target)

    def _is_over(self) -> bool:
        return not self._has_more and self._num_ended == self._num_started

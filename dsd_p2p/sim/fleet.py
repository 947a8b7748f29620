"""Runs a scenario: builds its machines, lets requests arrive, keeps what happened."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from dsd_p2p.errors import ConfigError, PeerDisconnected
from dsd_p2p.netmodel import LinkModel, LinkState
from dsd_p2p.placement.balance import Balancer, Load
from dsd_p2p.placement.coordinator import MODEL_COVERAGE
from dsd_p2p.placement.view import Speculation
from dsd_p2p.session.coordinator import Coordinator
from dsd_p2p.session.request import Request, Route
from dsd_p2p.sim.answer import Answer, ParametricAnswer, RecordedAnswer
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.request import DraftDevice, Path, RequestLog, RequestRun
from dsd_p2p.sim.scenario import DrafterPool, Scenario, TargetPool
from dsd_p2p.sim.service import Dedicated, SharedCores
from dsd_p2p.sim.swarm import Access, Node, SimulatedSwarm
from dsd_p2p.sim.target import Flight, Stage, StageModel, Target, TargetSession
from dsd_p2p.sim.trace import AgreementTrace
from dsd_p2p.sim.workload import Arrival, arrivals
from dsd_p2p.telemetry.events import PeerStatus
from dsd_p2p.telemetry.watch import RequestWatch, Sink
from dsd_p2p.types import SessionId, Span
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import MAX_TOKEN, Hop

PolicyOf = Callable[[], WindowPolicy]

_ASK_AGAIN_S = 1.0

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

    __slots__ = ("device", "draft_s", "paths", "peer", "pool", "trackers")

    def __init__(self, index: int, pool: DrafterPool, device: DraftDevice) -> None:
        self.pool, self.device = pool, device
        self.draft_s = pool.step.pass_cost().at(1)
        self.peer = f"drafter-{index}"
        self.paths: dict[str, Path] = {}
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
        self._busy_s: dict[str, float] = {}
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
        self._swarm = self._new_swarm() if scenario.nodes else None
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
            spread=pool.spread,
            max_batch=pool.max_batch,
            batching=pool.batching,
            hidden_bytes=pool.hidden_bytes,
        )
        shared = SharedCores(self.clock, pool.cores) if pool.cores else None
        stages = [
            Stage(
                model,
                self.clock,
                shared.user() if shared else Dedicated(self.clock),
                self._rng["service"],
                is_tail=index == pool.stages - 1,
            )
            for index in range(pool.stages)
        ]
        target = Target(name, stages, [inner] * (pool.stages - 1), self.clock, self._rng["service"])
        if self._is_recording:
            for index, stage in enumerate(stages):
                stage.log = partial(self._record_pass, name, index)
        self._targets.append(target)
        step = pool.draft_step
        self._target_devices.append(DraftDevice(step.pass_cost(), Dedicated(self.clock)) if step is not None else None)
        self._window_s.append(cost.at(self._scenario.speculation.depth + 1) / pool.max_batch)

    def _new_swarm(self) -> SimulatedSwarm:
        return SimulatedSwarm(
            self._scenario.nodes,
            self._scenario.layers,
            self._link_models,
            self.clock,
            self._rng["service"],
            self._record_pass if self._is_recording else None,
        )

    def _record_pass(self, target: str, stage: int, start_s: float, end_s: float, batch: list[Flight]) -> None:
        num_nodes = sum(len(flight.window.tokens) for flight in batch)
        self._passes.append((target, stage, start_s, end_s, len(batch), num_nodes))

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
        """Return the way from a drafter to the target that the balancer chooses, or over the chain that placement does."""
        models = self._link_models[drafter.pool.link]
        if self._swarm is not None:
            chosen = self._swarm.choose(models, self._expected(drafter))
            return None if chosen is None else self._path(drafter, chosen[0], chosen[1], None)
        up = [index for index, target in enumerate(self._targets) if target.is_up]
        if not up:
            return None
        round_trip_s = sum(model.latency_s for model in models)
        loads = [
            Load(self._num_requests[self._targets[index].name], self._window_s[index], round_trip_s) for index in up
        ]
        return self._path_to(drafter, up[self._balancer.choose(loads)])

    def _path_to(self, drafter: _Drafter, index: int) -> Path:
        is_at_target = self._scenario.speculation.placement == "target"
        device = self._target_devices[index] if is_at_target else None
        return self._path(drafter, self._targets[index], self._link_models[drafter.pool.link], device)

    def _expected(self, drafter: _Drafter) -> Speculation:
        """What placement expects of a drafter, as live peers do."""
        is_plain = self._scenario.speculation.window == "plain"
        return Speculation(coverage=0.0 if is_plain else MODEL_COVERAGE, draft_s=drafter.draft_s)

    def _path(self, drafter: _Drafter, target: Target, links: Access, device: DraftDevice | None) -> Path:
        path = drafter.paths.get(target.name)
        if path is None:
            there, back = links
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
            path = drafter.paths[target.name] = Path(target, LinkState(there), LinkState(back), route, device)
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
            for unit in self._swarm.nodes if self._swarm is not None else self._targets:
                self._schedule_failure(unit)
        self.clock.run(self._scenario.horizon)
        if self._num_started > self._num_ended:
            self._ended_s = self.clock.now_s
            self._count_under_way()
        duration_s = max(self._ended_s, 1e-12)
        return FleetRun(
            scenario=self._scenario,
            duration_s=duration_s,
            logs=self._logs,
            stages=[self._stage_report(*each) for each in self._stages()],
            mean_under_way=self._under_way_s / duration_s,
            num_leaked=sum(len(target.sessions) for target in self._all_targets())
            if self._num_ended == self._num_started
            else 0,
            num_unfinished=self._num_started - self._num_ended,
            passes=self._passes,
        )

    def _all_targets(self) -> list[Target]:
        return self._swarm.chains if self._swarm is not None else self._targets

    def _stages(self) -> Iterator[tuple[str, int, Stage]]:
        """Every stage, by the name of its target or peer."""
        if self._swarm is not None:
            units = [(str(node.peer), node.stages) for node in self._swarm.nodes]
        else:
            units = [(target.name, list(target.stages)) for target in self._targets]
        return ((name, index, stage) for name, stages in units for index, stage in enumerate(stages))

    def _stage_report(self, name: str, index: int, stage: Stage) -> StageReport:
        duration_s = max(self._ended_s, 1e-12)
        return StageReport(
            target=name,
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
                span, num_layers = Span(index, index + 1), len(target.stages)
                peer, num_sessions = f"{target.name}/{index}", len(target.sessions)
                tell(self._status(peer, [stage], span, num_layers, num_sessions, is_up=target.is_up))
        for node in self._swarm.nodes if self._swarm is not None else ():
            is_up, num_layers = node.is_up and node.span is not None, self._scenario.layers
            span = node.span or Span(0, num_layers)
            tell(self._status(node.peer, node.stages, span, num_layers, node.num_sessions, is_up=is_up))
        if not self._is_over():
            self.clock.after(_STATUS_S, self._tell_stages, tell)

    def _status(
        self, peer: str, stages: Sequence[Stage], span: Span, num_layers: int, num_sessions: int, *, is_up: bool
    ) -> PeerStatus:
        total_s = sum(stage.busy_s for stage in stages)
        busy_s, self._busy_s[peer] = total_s - self._busy_s.get(peer, 0.0), total_s
        return PeerStatus(
            at_s=self.clock.now_s,
            peer=peer,
            is_online=is_up,
            roles=("stage",),
            model="simulated",
            first=span.first,
            last=span.last,
            num_layers=num_layers,
            state="serving" if is_up else "down",
            num_sessions=num_sessions,
            queue=sum(stage.num_waiting for stage in stages),
            busy_share=max(0.0, min(1.0, busy_s / _STATUS_S)),
            num_passes=sum(stage.num_passes for stage in stages),
            num_windows=sum(stage.num_served for stage in stages),
        )

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
        path = self._choose_path(drafter)
        if path is None and self._swarm is not None:
            # Some layers have no holder: whoever asks is told so, and asks again.
            self.clock.after(_ASK_AGAIN_S, self._start, arrival, drafter)
            return
        # Where no target is up a drafter tries one, and finds out.
        path = path or self._path_to(drafter, 0)
        self._count_under_way()
        number = self._num_started
        self._num_started += 1
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
                if self._swarm is not None:
                    self._swarm.moved(target, change)

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

    def _schedule_failure(self, unit: Target | Node) -> None:
        self.clock.after(self._rng["churn"].expovariate(1 / self._scenario.churn.up), self._fail, unit)

    def _fail(self, unit: Target | Node) -> None:
        if self._is_over():
            return
        churn = self._scenario.churn
        if isinstance(unit, Node):
            assert self._swarm is not None
            self._lose(self._swarm.fail(unit), f"{unit.peer} is down")
            self.clock.after(churn.notice, self._close_gaps, self._swarm)
        else:
            self._lose(unit.fail(), f"{unit.name} is down")
        self.clock.after(self._rng["churn"].expovariate(1 / churn.down), self._recover, unit)

    def _recover(self, unit: Target | Node) -> None:
        unit.is_up = True
        if not self._is_over():
            self._schedule_failure(unit)

    def _close_gaps(self, swarm: SimulatedSwarm) -> None:
        """Peers load the layers that nobody holds any more, as live ones agree to."""
        while (move := swarm.close_gap()) is not None:
            node, span = move
            self._lose(swarm.give_up(node, span), f"{node.peer} loads other layers")
            self.clock.after(node.pool.load * span.num_layers, swarm.loaded, node, span)

    def _lose(self, sessions: list[TargetSession], reason: str) -> None:
        for session in sessions:
            self.clock.after(self._scenario.churn.notice, session.client.lost, PeerDisconnected(reason), session)

    def _is_over(self) -> bool:
        return not self._has_more and self._num_ended == self._num_started

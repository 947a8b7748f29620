"""Runs a scenario: builds its machines, starts its requests and collects the results."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dsd_p2p.netmodel import LinkState
from dsd_p2p.placement.balance import Balancer
from dsd_p2p.placement.coordinator import MODEL_COVERAGE
from dsd_p2p.placement.view import Speculation
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Request, Route
from dsd_p2p.sim.agreement import Agreement
from dsd_p2p.sim.answer import Answer
from dsd_p2p.sim.churn import Churn
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.machines import Choice, Machines, TargetPark
from dsd_p2p.sim.request import SIMULATED_MODEL, DraftDevice, Path, RequestLog, RequestRun, RunSettings, RunWorld
from dsd_p2p.sim.scenario import DrafterPool, Scenario
from dsd_p2p.sim.service import Dedicated
from dsd_p2p.sim.statuses import StageStatuses
from dsd_p2p.sim.swarm import SimulatedSwarm
from dsd_p2p.sim.tally import Tally, Timeline
from dsd_p2p.sim.target import Stage, Target
from dsd_p2p.sim.texts import Texts
from dsd_p2p.sim.workload import Arrival, arrivals
from dsd_p2p.telemetry.watch import RequestWatch, Sink
from dsd_p2p.types import MAX_POSITIONS, MAX_TOKEN, Endpoint, SessionId, Span, TextRequest
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import Hop

PolicyOf = Callable[[], WindowPolicy]

_ASK_AGAIN_S = 1.0


@dataclass(slots=True)
class StageReport:
    """The figures of one stage over the whole run. mean_queue: waiting windows, averaged over time."""

    target: str
    stage: int
    busy_share: float
    mean_queue: float
    num_served: int
    num_passes: int


@dataclass(slots=True)
class FleetRun:
    """The results of a run.

    logs: the requests that ended, in the order of their ends. mean_under_way: requests under way, averaged over time.
    passes: each pass as (target, stage, start, end, windows, nodes), if they were recorded.
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
    """A machine that drafts and starts requests."""

    __slots__ = ("device", "draft_s", "paths", "peer", "pool", "trackers")

    def __init__(self, index: int, pool: DrafterPool, device: DraftDevice) -> None:
        self.pool, self.device = pool, device
        self.draft_s = pool.step.pass_cost().at(1)
        self.peer = f"drafter-{index}"
        self.paths: dict[str, Path] = {}
        self.trackers: dict[str, Tracker] = {}


class Fleet:
    """One run of a scenario. Call `run` once.

    policy_of: makes the window policy of one request. trace: recorded answers to use instead of parametric ones.
    is_recording: keep every request's arrivals and every pass, for a timeline.
    tell: receives the events that a live swarm's telemetry would report.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy_of: PolicyOf,
        trace: Agreement | None = None,
        *,
        is_recording: bool = False,
        progress: Callable[[int, float], None] | None = None,
        tell: Sink | None = None,
    ) -> None:
        self._scenario, self._policy_of, self._tell = scenario, policy_of, tell
        self.clock = Clock()
        # Each has a generator of its own, so that changed links leave the texts and arrivals as they are.
        self._rng = {
            name: random.Random(f"{scenario.seed} {name}")  # noqa: S311 - a simulation
            for name in ("arrivals", "links", "service", "routing", "texts", "churn", "retries")
        }
        self._access = {name: link.models() for name, link in scenario.links.items()}
        self._timeline = Timeline(is_recording=is_recording)
        self._machines: Machines[Any] = self._new_swarm() if scenario.peers else self._new_park()
        self._drafters = [
            self._new_drafter(pool, index)
            for index, pool in enumerate(pool for pool in scenario.drafters for _ in range(pool.count))
        ]
        self._texts = Texts(scenario.acceptance, trace, self._rng["texts"])
        self._source: Iterator[Arrival] = iter(())
        self._tally = Tally(self.clock, progress)
        self._churn = Churn(scenario.churn, self._machines, self.clock, self._rng["churn"], self._tally)

    @property
    def trackers(self) -> list[Tracker]:
        """Each drafter's measurements of each target, if the scenario's drafters remember them."""
        return [tracker for drafter in self._drafters for tracker in drafter.trackers.values()]

    # Building

    def _new_park(self) -> TargetPark:
        balancer = Balancer(self._scenario.speculation.routing, self._rng["routing"])
        return TargetPark(
            self._scenario, self._access, self.clock, self._rng["service"], balancer, self._timeline.pass_log
        )

    def _new_swarm(self) -> SimulatedSwarm:
        return SimulatedSwarm(
            self._scenario.peers,
            self._scenario.layers,
            self._access,
            self.clock,
            self._rng["service"],
            self._timeline.pass_log,
        )

    def _new_drafter(self, pool: DrafterPool, index: int) -> _Drafter:
        return _Drafter(index, pool, DraftDevice(pool.step.pass_cost(), Dedicated(self.clock)))

    # Routing

    def _choose_path(self, drafter: _Drafter) -> Path | None:
        """Return the path that a drafter's request takes now; None if nothing can serve it."""
        choice = self._choose(drafter)
        return None if choice is None else self._path(drafter, choice)

    def _choose(self, drafter: _Drafter) -> Choice | None:
        is_plain = self._scenario.speculation.policy == "plain"
        # Live peers expect the same of a drafter when they choose a route.
        expected = Speculation(coverage=0.0 if is_plain else MODEL_COVERAGE, draft_s=drafter.draft_s)
        return self._machines.choose(self._access[drafter.pool.link], expected)

    def _path(self, drafter: _Drafter, choice: Choice) -> Path:
        target = choice.target
        path = drafter.paths.get(target.name)
        if path is None:
            there, back = choice.access
            hops = tuple(
                Hop(peer=f"{target.name}/{stage}", address="", span=Span(stage, stage + 1))
                for stage in range(len(target.stages))
            )
            route = Route(hops=hops, model=SIMULATED_MODEL, max_positions=MAX_POSITIONS)
            path = drafter.paths[target.name] = Path(target, LinkState(there), LinkState(back), route, choice.device)
        return path

    # Requests

    def run(self) -> FleetRun:
        """Run the workload to its end, or to the horizon, and return the results."""
        workload = self._scenario.workload
        self._source = arrivals(workload, self._rng["arrivals"])
        if workload.arrivals == "closed":
            for number in range(min(workload.concurrency, workload.requests)):
                self._next_closed(self._drafters[number % len(self._drafters)])
        else:
            self._next_open()
        if self._tell is not None:
            StageStatuses(self._machines, self.clock, self._tally, self._tell).start()
        self._churn.start()
        self.clock.run(self._scenario.horizon)
        tally = self._tally
        tally.close()
        return FleetRun(
            scenario=self._scenario,
            duration_s=tally.duration_s,
            logs=tally.logs,
            stages=[
                self._stage_report(unit.name, index, stage)
                for unit in self._machines.units
                for index, stage in enumerate(unit.stages)
            ],
            mean_under_way=tally.under_way_s / tally.duration_s,
            num_leaked=0 if tally.num_under_way else sum(len(target.sessions) for target in self._machines.targets),
            num_unfinished=tally.num_under_way,
            passes=self._timeline.passes,
        )

    def _stage_report(self, name: str, index: int, stage: Stage) -> StageReport:
        duration_s = self._tally.duration_s
        return StageReport(
            target=name,
            stage=index,
            busy_share=stage.busy_s / duration_s,
            mean_queue=stage.queued_s / duration_s,
            num_served=stage.num_served,
            num_passes=stage.num_passes,
        )

    def _next_arrival(self) -> Arrival | None:
        arrival = next(self._source, None)
        self._tally.has_more = arrival is not None
        return arrival

    def _next_open(self) -> None:
        if (arrival := self._next_arrival()) is not None:
            self.clock.after(arrival.arrived_s - self.clock.now_s, self._arrive_open, arrival)

    def _arrive_open(self, arrival: Arrival) -> None:
        self._start(arrival, self._drafters[self._tally.num_started % len(self._drafters)])
        self._next_open()

    def _next_closed(self, drafter: _Drafter) -> None:
        if (arrival := self._next_arrival()) is not None:
            self._start(arrival, drafter)

    def _start(self, arrival: Arrival, drafter: _Drafter) -> None:
        number = self._tally.started()
        log = RequestLog(number, self.clock.now_s, arrival.num_prompt_tokens, arrivals=self._timeline.new_arrivals())
        self._ask(drafter, log, self._texts.answer(number, arrival), arrival.num_answer_tokens)

    def _ask(self, drafter: _Drafter, log: RequestLog, answer: Answer, num_answer_tokens: int) -> None:
        """Start the request, or try again later while some layers have no holder."""
        choice = self._choose(drafter) or self._machines.fallback(self._access[drafter.pool.link])
        if choice is None:
            self.clock.after(_ASK_AGAIN_S, self._ask, drafter, log, answer, num_answer_tokens)
            return
        path = self._path(drafter, choice)
        scenario, speculation = self._scenario, self._scenario.speculation
        trackers = drafter.trackers if speculation.remembers else {}
        tracker = trackers.setdefault(path.target.name, Tracker())
        request = Request(
            text=TextRequest(max_tokens=num_answer_tokens),
            coordinator=Endpoint(drafter.peer),
            session=SessionId(log.number.to_bytes(8, "little")),
            prompt=[0] * log.num_prompt_tokens,
            vocab_size=MAX_TOKEN,
            prefill_chunk=speculation.prefill_chunk,
            stall_timeout_s=float("inf"),
        )
        machine = RequestMachine(request, path.route, self._policy_of(), tracker, self._rng["retries"])
        settings = RunSettings(
            deadline_s=log.arrived_s + scenario.workload.slo_ttft + num_answer_tokens * scenario.workload.slo_tpot,
            notice_s=scenario.churn.notice,
            is_fusing=speculation.mode == "auto",
            is_at_target=speculation.placement == "target" or speculation.mode == "fused",
        )
        world = RunWorld(
            clock=self.clock,
            rng=self._rng["links"],
            device=drafter.device,
            choose_path=partial(self._choose_path, drafter),
            finished=partial(self._ended, drafter),
            moved=self._moved,
            watch=self._watch_of(machine),
        )
        run = RequestRun(machine, answer, log, settings, world)
        run.start(path)

    def _watch_of(self, machine: RequestMachine) -> RequestWatch | None:
        if self._tell is None:
            return None
        return RequestWatch(machine, self._tell, lambda: self.clock.now_s, lambda: "simulated")

    def _moved(self, before: Target | None, after: Target | None) -> None:
        """Move a request from the load of target `before` to that of target `after`."""
        for target, change in ((before, -1), (after, 1)):
            if target is not None:
                self._machines.moved(target, change)

    def _ended(self, drafter: _Drafter, run: RequestRun) -> None:
        self._tally.ended(run.log)
        workload = self._scenario.workload
        if workload.arrivals == "closed":
            self.clock.after(workload.think, self._next_closed, drafter)

"""Runs one request on one idle route in virtual time."""

from dataclasses import dataclass

from dsd_p2p.netmodel import LinkModel, LinkState
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Request, RequestStats, Route
from dsd_p2p.session.timing import Timing
from dsd_p2p.sim.answer import Answer
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.request import (
    SIMULATED_MODEL,
    SIMULATED_PEER,
    DraftDevice,
    Path,
    RequestLog,
    RequestRun,
    RunSettings,
    RunWorld,
)
from dsd_p2p.sim.service import Dedicated, PassCost, SharedCores
from dsd_p2p.sim.target import Stage, StageModel, Target
from dsd_p2p.types import MAX_POSITIONS, MAX_TOKEN, SessionId, Span, TextRequest, TokenId
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import Hop

_DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteModel:
    """The costs of a route, in seconds unless said otherwise.

    stages: cost of one pass of each stage. draft: cost of one draft step over n stems.
    link: one direction of each of the `len(stages) + 1` links, which are all alike.
    up: the link to the head, if it differs.
    hidden_bytes: bytes of one position's hidden state between stages.
    cores: number of cores that stages and drafter share; 0: each has a machine of its own.
    draft_weight: the drafter's weight in sharing the cores; a stage weighs 1.
    handling_s: work of each stage beside each pass.
    coordinator_s: the coordinator's work on each message, which delays drafts.
    """

    stages: tuple[PassCost, ...]
    link: LinkModel
    up: LinkModel | None = None
    draft: PassCost
    hidden_bytes: int = 0
    cores: float = 0.0
    draft_weight: float = 1.0
    handling_s: float = 0.0
    coordinator_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """The result of a simulated request; arrivals are (seconds since the start, tokens)."""

    tokens: list[TokenId]
    arrivals: list[tuple[float, int]]
    stats: RequestStats

    @property
    def timing(self) -> Timing:
        """The arrivals, summed up like those of a live answer."""
        timing = Timing(started_at_s=0.0)
        for at_s, num_tokens in self.arrivals:
            timing.arrived(num_tokens, at_s)
        return timing


class _NoRng:
    def random(self) -> float:
        return 0.5


def simulate_request(
    answer: Answer,
    costs: RouteModel,
    policy: WindowPolicy,
    tracker: Tracker,
    max_tokens: int,
    num_prompt_tokens: int = 1,
) -> SimulatedRequest:
    """Simulate `max_tokens` of an answer after a prompt of `num_prompt_tokens`; return the result."""
    clock, rng = Clock(), _NoRng()
    shared = SharedCores(clock, costs.cores) if costs.cores else None
    stages = [
        Stage(
            StageModel(cost=cost, hidden_bytes=costs.hidden_bytes, handling_s=costs.handling_s),
            clock,
            shared.user() if shared else Dedicated(clock),
            rng,
            is_tail=index == len(costs.stages) - 1,
        )
        for index, cost in enumerate(costs.stages)
    ]
    target = Target("sim", stages, [costs.link] * (len(stages) - 1), clock, rng)
    hop = Hop(peer="sim", address="", span=Span(0, 1))
    route = Route(hops=(hop,) * len(costs.stages), model=SIMULATED_MODEL, max_positions=MAX_POSITIONS)
    path = Path(target, LinkState(costs.up or costs.link), LinkState(costs.link), route)
    request = Request(
        text=TextRequest(max_tokens=max_tokens),
        coordinator=SIMULATED_PEER,
        session=SessionId(bytes(8)),
        prompt=[0] * num_prompt_tokens,
        vocab_size=MAX_TOKEN,
        stall_timeout_s=_DEADLINE_S,
    )
    machine = RequestMachine(request, route, policy, tracker, rng)
    log = RequestLog(0, 0.0, num_prompt_tokens, arrivals=[])
    processor = shared.user(costs.draft_weight) if shared else Dedicated(clock)
    world = RunWorld(
        clock=clock,
        rng=rng,
        device=DraftDevice(costs.draft, processor, costs.coordinator_s),
        choose_path=lambda: path,
        finished=lambda _run: None,
        moved=lambda _before, _after: None,
    )
    run = RequestRun(machine, answer, log, RunSettings(deadline_s=_DEADLINE_S), world)
    run.start(path)
    clock.run(_DEADLINE_S)
    assert log.arrivals is not None
    return SimulatedRequest(tokens=machine.tokens[num_prompt_tokens:], arrivals=log.arrivals, stats=machine.stats)

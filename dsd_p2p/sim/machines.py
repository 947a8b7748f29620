"""What a scenario's requests run on: whole targets behind a balancer, or peers that placement routes (`dsd_p2p.sim.swarm`)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from dsd_p2p.netmodel import LinkModel
from dsd_p2p.placement.balance import Balancer, Load
from dsd_p2p.placement.view import Speculation
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.request import DraftDevice
from dsd_p2p.sim.scenario import Scenario, TargetPool
from dsd_p2p.sim.service import Dedicated, SharedCores
from dsd_p2p.sim.target import Flight, Stage, StageModel, Target, TargetSession
from dsd_p2p.types import Span, UniformRng

Access = tuple[LinkModel, LinkModel]
"""A machine's own link: to it, and from it."""

PassLog = Callable[[str, int, float, float, list[Flight]], None]
"""Is told of every pass: name of the unit, number of its stage, start, end, windows."""


class Unit(Protocol):
    """What goes down as one."""

    is_up: bool

    @property
    def name(self) -> str:
        """Unique in the scenario."""
        ...

    @property
    def stages(self) -> Sequence[Stage]:
        """All that ever computed here."""
        ...


UnitT = TypeVar("UnitT", bound=Unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where a request goes. access: the way to the target's head and from its tail. device: drafts there, where one may."""

    target: Target
    access: Access
    device: DraftDevice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One peer as a live swarm's telemetry shows it."""

    peer: str
    stages: Sequence[Stage]
    span: Span
    num_layers: int
    num_sessions: int
    is_up: bool


class Machines(Protocol[UnitT]):
    """All that computes windows."""

    @property
    def units(self) -> Sequence[UnitT]:
        """What may go down, in the order it was made."""
        ...

    @property
    def targets(self) -> Sequence[Target]:
        """Those that requests may still be at."""
        ...

    def places(self) -> Iterator[Place]:
        """Every peer as it is now."""
        ...

    def choose(self, access: Access, speculation: Speculation) -> Choice | None:
        """Return where a request goes now, None where nothing can serve it. access: the own link of whoever asks."""
        ...

    def fallback(self, access: Access) -> Choice | None:
        """Return what whoever asks tries, and is disappointed by, where nothing can serve; None where that is known at once."""
        ...

    def moved(self, target: Target, change: int) -> None:
        """So many more requests are at a target."""
        ...

    def fail(self, unit: UnitT) -> list[TargetSession]:
        """A unit goes down. Returns the sessions that were open there."""
        ...

    def mend(self) -> list[TargetSession]:
        """Do what is done about what is down, once it is noticed. Returns the sessions that this ends."""
        ...


class TargetPark:
    """Whole targets, each a machine or a route of its own, and the balancer before them. links: of the scenario, by name."""

    def __init__(
        self,
        scenario: Scenario,
        links: Mapping[str, Access],
        clock: Clock,
        rng: UniformRng,
        balancer: Balancer,
        log: PassLog | None,
    ) -> None:
        self._links, self._clock, self._rng, self._balancer, self._log = links, clock, rng, balancer, log
        self._speculation = scenario.speculation
        self._num_requests: Counter[str] = Counter()
        self._devices: list[DraftDevice | None] = []
        self._window_s: list[float] = []
        self.targets: list[Target] = []
        for pool in scenario.targets:
            for _ in range(pool.count):
                self._add(pool)

    @property
    def units(self) -> Sequence[Target]:
        """The targets."""
        return self.targets

    def places(self) -> Iterator[Place]:
        """Every stage of every target."""
        for target in self.targets:
            for index, stage in enumerate(target.stages):
                yield Place(
                    peer=f"{target.name}/{index}",
                    stages=[stage],
                    span=Span(index, index + 1),
                    num_layers=len(target.stages),
                    num_sessions=len(target.sessions),
                    is_up=target.is_up,
                )

    def choose(self, access: Access, speculation: Speculation) -> Choice | None:
        """Return the target that the balancer chooses among those that are up."""
        up = [index for index, target in enumerate(self.targets) if target.is_up]
        if not up:
            return None
        round_trip_s = sum(model.latency_s for model in access)
        loads = [
            Load(self._num_requests[self.targets[index].name], self._window_s[index], round_trip_s) for index in up
        ]
        return self._choice(up[self._balancer.choose(loads)], access)

    def fallback(self, access: Access) -> Choice:
        """Nobody says which targets are down: one is tried."""
        return self._choice(0, access)

    def moved(self, target: Target, change: int) -> None:
        """So many more requests are at a target."""
        self._num_requests[target.name] += change

    def fail(self, unit: Target) -> list[TargetSession]:
        """A target goes down."""
        return unit.fail()

    def mend(self) -> list[TargetSession]:
        """Whole targets have nobody who steps in."""
        return []

    def _choice(self, index: int, access: Access) -> Choice:
        device = self._devices[index] if self._speculation.placement == "target" else None
        return Choice(target=self.targets[index], access=access, device=device)

    def _add(self, pool: TargetPool) -> None:
        name = f"target-{len(self.targets)}"
        cost = pool.stage.pass_cost()
        inner = self._links[pool.inner_link][0] if pool.inner_link else LinkModel()
        model = StageModel(
            cost=cost,
            spread=pool.spread,
            max_batch=pool.max_batch,
            batching=pool.batching,
            hidden_bytes=pool.hidden_bytes,
        )
        shared = SharedCores(self._clock, pool.cores) if pool.cores else None
        stages = [
            Stage(
                model,
                self._clock,
                shared.user() if shared else Dedicated(self._clock),
                self._rng,
                is_tail=index == pool.stages - 1,
            )
            for index in range(pool.stages)
        ]
        if self._log is not None:
            for index, stage in enumerate(stages):
                stage.log = partial(self._log, name, index)
        self.targets.append(Target(name, stages, [inner] * (pool.stages - 1), self._clock, self._rng))
        step = pool.draft_step
        self._devices.append(DraftDevice(step.pass_cost(), Dedicated(self._clock)) if step is not None else None)
        self._window_s.append(cost.at(self._speculation.depth + 1) / pool.max_batch)

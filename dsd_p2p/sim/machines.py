"""Describes the machines that a scenario's requests run on.

They are whole targets behind a balancer, or peers that placement joins into routes (`dsd_p2p.sim.swarm`).
"""

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
"""The two directions of a link: towards the target or peer, and back.

So the first direction leads out of a drafter, but into a peer.
"""

PassLog = Callable[[str, int, float, float, list[Flight]], None]
"""A function called after every pass with the unit's name, the number of its stage, start, end and windows."""


class Unit(Protocol):
    """A target or a peer, which fails as a whole."""

    is_up: bool

    @property
    def name(self) -> str:
        """The unit's name, unique in the scenario."""
        ...

    @property
    def stages(self) -> Sequence[Stage]:
        """All stages that ever computed on this unit."""
        ...


UnitT = TypeVar("UnitT", bound=Unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The target of a request and the way to it.

    access: the link to the target's head and the link from its tail.
    device: drafts at the target; None if drafts are made at the drafter.
    """

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
    """All machines that compute windows."""

    @property
    def units(self) -> Sequence[UnitT]:
        """The units that may fail, in the order in which they were made."""
        ...

    @property
    def targets(self) -> Sequence[Target]:
        """The targets that requests may still use."""
        ...

    def places(self) -> Iterator[Place]:
        """Yield every peer as it is now."""
        ...

    def choose(self, access: Access, speculation: Speculation) -> Choice | None:
        """Return where a request goes now; None if nothing can serve it. access: the drafter's own link."""
        ...

    def fallback(self, access: Access) -> Choice | None:
        """Return what a drafter tries in vain when nothing can serve; None if it knows that at once."""
        ...

    def moved(self, target: Target, change: int) -> None:
        """Add `change` to the number of requests at `target`."""
        ...

    def fail(self, unit: UnitT) -> list[TargetSession]:
        """Take a unit down and return the sessions that were open there."""
        ...

    def mend(self) -> list[TargetSession]:
        """Repair what the noticed failures left open, if possible, and return the sessions that this ends."""
        ...


class TargetPark:
    """Whole targets behind a balancer, each a machine or a route of its own. links: the scenario's links by name."""

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
        """Yield every stage of every target as a peer."""
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
        """Return the first target: a drafter does not know which targets are down, so it tries one."""
        return self._choice(0, access)

    def moved(self, target: Target, change: int) -> None:
        """Add `change` to the number of requests at `target`."""
        self._num_requests[target.name] += change

    def fail(self, unit: Target) -> list[TargetSession]:
        """Take a target down and return the sessions that were open there."""
        return unit.fail()

    def mend(self) -> list[TargetSession]:
        """Do nothing: no machine takes over for a whole target."""
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

"""Simulates peers that each hold some layers of a model.

The live placement code places them and joins them into a route for each request.
"""

import itertools
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from dsd_p2p.netmodel import in_series
from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.span import choose_move, choose_span
from dsd_p2p.placement.view import WIDE_WINDOW_NODES, PeerView, Plan, PlannedStage, Speculation, SwarmView
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.machines import Access, Choice, PassLog, Place
from dsd_p2p.sim.scenario import PeerPool
from dsd_p2p.sim.service import PassCost, SharedCores
from dsd_p2p.sim.target import Stage, StageModel, Target, TargetSession
from dsd_p2p.types import PeerId, Span, UniformRng

_MAX_PLANS = 4096
"""Number of routes remembered: the same swarm under the same load gives the same route."""

_COORDINATOR = PeerId("coordinator")


@dataclass(slots=True, eq=False)
class SimulatedPeer:
    """One peer. layer: cost of one layer's pass. access: its own link. span: the layers it holds; None while it loads.

    stages: all stages that ever computed here, on the peer's one core.
    serving: the stages that routes go through now, by their layers.
    """

    peer: PeerId
    pool: PeerPool
    layer: PassCost
    access: Access
    cores: SharedCores
    span: Span | None = None
    next_span: Span | None = None
    is_up: bool = True
    num_sessions: int = 0
    stages: list[Stage] = field(default_factory=list)
    serving: dict[Span, Stage] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The peer's id."""
        return self.peer

    def view(self) -> PeerView:
        """Return the peer as other peers see it."""
        return PeerView(
            peer=self.peer,
            span=self.span if self.is_up else None,
            max_layers=self.pool.max_layers,
            layer_s=self.layer.at(1),
            layer16_s=self.layer.at(WIDE_WINDOW_NODES),
            num_sessions=self.num_sessions,
        )


class SimulatedSwarm:
    """All peers, the layers that they hold, and the routes of their requests; each route is a `Target`.

    links: the scenario's links by name.
    """

    def __init__(
        self,
        pools: Sequence[PeerPool],
        num_layers: int,
        links: Mapping[str, Access],
        clock: Clock,
        rng: UniformRng,
        log: PassLog | None = None,
    ) -> None:
        self._num_layers, self._clock, self._rng, self._log = num_layers, clock, rng, log
        self.units = [
            SimulatedPeer(
                peer=PeerId(f"peer-{index}"),
                pool=pool,
                layer=pool.layer.pass_cost(),
                access=links[pool.link],
                cores=SharedCores(clock, 1),
            )
            for index, pool in enumerate(pool for pool in pools for _ in range(pool.count))
        ]
        self._by_peer = {peer.peer: peer for peer in self.units}
        self._one_way_s: dict[tuple[str, str], float] = {
            (a.peer, b.peer): a.access[1].latency_s + b.access[0].latency_s
            for a, b in itertools.permutations(self.units, 2)
        }
        self._routes: dict[tuple[PlannedStage, ...], Target] = {}
        self._num_routes = 0
        self._peers_of: dict[str, list[SimulatedPeer]] = {}
        self._plan = lru_cache(_MAX_PLANS)(self._planned)
        joined: tuple[PeerView, ...] = ()
        for peer in self.units:
            peer.span = choose_span(self._view(joined, {}), peer.view())
            joined = (*joined, peer.view())

    @property
    def targets(self) -> Sequence[Target]:
        """The routes that requests may still use."""
        return list(self._routes.values())

    def places(self) -> Iterator[Place]:
        """Yield every peer."""
        for peer in self.units:
            yield Place(
                peer=peer.peer,
                stages=peer.stages,
                span=peer.span or Span(0, self._num_layers),
                num_layers=self._num_layers,
                num_sessions=peer.num_sessions,
                is_up=peer.is_up and peer.span is not None,
            )

    def choose(self, access: Access, speculation: Speculation) -> Choice | None:
        """Return the route that a request would take now; None while some layers have no holder."""
        views = tuple(peer.view() for peer in self.units)
        plan = self._plan(access[0].latency_s, access[1].latency_s, speculation, views)
        if plan is None:
            return None
        target = self._routes.get(plan.stages) or self._new_route(plan.stages)
        head, tail = self._by_peer[plan.stages[0].peer], self._by_peer[plan.stages[-1].peer]
        way = in_series(access[0], head.access[0]), in_series(tail.access[1], access[1])
        return Choice(target=target, access=way)

    def fallback(self, access: Access) -> None:
        """Return None: the drafter knows at once that some layers have no holder."""

    def moved(self, target: Target, change: int) -> None:
        """Add `change` to the number of sessions of every peer on a route."""
        for peer in self._peers_of[target.name]:
            peer.num_sessions += change

    def fail(self, unit: SimulatedPeer) -> list[TargetSession]:
        """Take a peer down with every route through it; return the sessions that this ends."""
        unit.is_up = False
        return self._end_routes(unit)

    def mend(self) -> list[TargetSession]:
        """Have peers drop their layers and load those that no peer holds any more, as live peers agree to.

        Return the sessions that this ends.
        """
        lost: list[TargetSession] = []
        while (move := self._gap_closing()) is not None:
            peer, span = move
            peer.span, peer.next_span = None, span
            peer.serving.clear()
            lost += self._end_routes(peer)
            self._clock.after(peer.pool.load * span.num_layers, self._loaded, peer, span)
        return lost

    def _gap_closing(self) -> tuple[SimulatedPeer, Span] | None:
        """Return a peer that should hold other layers, with these layers; None if no peer should.

        A peer that is loading counts as if it had finished.
        """
        views = tuple(replace(peer.view(), span=peer.next_span or peer.span) for peer in self.units if peer.is_up)
        move = choose_move(self._view(views, {}))
        return None if move is None else (self._by_peer[move.peer], move.span)

    def _loaded(self, peer: SimulatedPeer, span: Span) -> None:
        """Give the peer its new layers, unless it has been asked for others meanwhile."""
        if peer.next_span == span:
            peer.span, peer.next_span = span, None

    def _planned(
        self, up_s: float, down_s: float, speculation: Speculation, views: tuple[PeerView, ...]
    ) -> Plan | None:
        own: dict[tuple[str, str], float] = {
            (_COORDINATOR, peer.peer): up_s + peer.access[0].latency_s for peer in self.units
        }
        own |= {(peer.peer, _COORDINATOR): peer.access[1].latency_s + down_s for peer in self.units}
        return choose_route(self._view(views, own), _COORDINATOR, speculation)

    def _view(self, peers: tuple[PeerView, ...], links: dict[tuple[str, str], float]) -> SwarmView:
        return SwarmView(num_layers=self._num_layers, peers=peers, one_way_s=ChainMap(links, self._one_way_s))

    def _new_route(self, stages: tuple[PlannedStage, ...]) -> Target:
        peers = [self._by_peer[stage.peer] for stage in stages]
        target = Target(
            f"route-{self._num_routes}",
            [self._stage(peer, stage.span) for peer, stage in zip(peers, stages, strict=True)],
            [in_series(a.access[1], b.access[0]) for a, b in itertools.pairwise(peers)],
            self._clock,
            self._rng,
        )
        self._num_routes += 1
        self._routes[stages], self._peers_of[target.name] = target, peers
        return target

    def _stage(self, peer: SimulatedPeer, span: Span) -> Stage:
        stage = peer.serving.get(span)
        if stage is None:
            model = StageModel(
                cost=peer.layer.scaled(span.num_layers),
                max_batch=peer.pool.max_batch,
                batching=peer.pool.batching,
                spread=peer.pool.spread,
                hidden_bytes=peer.pool.hidden_bytes,
            )
            is_tail = span.last == self._num_layers
            stage = peer.serving[span] = Stage(model, self._clock, peer.cores.user(), self._rng, is_tail=is_tail)
            if self._log is not None:
                stage.log = partial(self._log, peer.peer, len(peer.stages))
            peer.stages.append(stage)
        return stage

    def _end_routes(self, peer: SimulatedPeer) -> list[TargetSession]:
        """End all routes through a peer and return their sessions; the same plan later makes a new route."""
        ended = [stages for stages in self._routes if any(stage.peer == peer.peer for stage in stages)]
        return [session for stages in ended for session in self._routes.pop(stages).fail()]

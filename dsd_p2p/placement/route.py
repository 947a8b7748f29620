"""Chooses a request's route: the one with the fewest predicted seconds per token over all layers that peers hold.

How it works. The seconds per token weigh the traversal and the slowest stage. For any limit on the slowest stage,
`.search` finds the least traversal. The limits that can matter are the times of single stages. A few of them are tried
at once; then only intervals between them that could still hold a better route are divided further.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.placement.search import Tables, least_traversals, tables_of, trace
from dsd_p2p.placement.view import Plan, PlannedStage, Speculation, SwarmView, seconds_per_token
from dsd_p2p.types import PeerId, Span

_REFILL_LAYER_S = 0.02
"""Penalty per layer whose keys and values must be computed again: a stage that still has them is worth a detour."""

_NUM_LIMITS, _FEW_LIMITS = 12, 5
"""Limits on the slowest stage that are tried at once, in a small and in a large swarm."""

_MAX_ROUNDS, _FEW_ROUNDS = 12, 2

_SMALL_SWARM, _MANY_STEPS, _FEW_STEPS = 16, 20_000, 60
"""Steps of the search for a route that comes back to no peer, in a small swarm and in others."""

_TOLERANCE = 0.02
"""In a swarm that is not small, a route that is this much slower than the best one will do."""

_NEAREST, _FAR_SWARM = 16, 64
"""In a swarm of more peers, only so many of them are considered for each layer: the nearest and fastest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detour:
    """The peers and links (in either direction) that a replacement route must avoid, and the stages it should keep."""

    peers: frozenset[str] = frozenset()
    links: frozenset[tuple[str, str]] = frozenset()
    kept: frozenset[PlannedStage] = frozenset()

    def without(self, view: SwarmView) -> SwarmView:
        """Return the view without the avoided peers and links."""
        links = {
            (a, b): seconds
            for (a, b), seconds in view.one_way_s.items()
            if (a, b) not in self.links and (b, a) not in self.links
        }
        peers = tuple(peer for peer in view.peers if peer.peer not in self.peers)
        return replace(view, peers=peers, one_way_s=links)


def choose_route(
    view: SwarmView,
    coordinator: PeerId,
    speculation: Speculation | None = None,
    detour: Detour | None = None,
) -> Plan | None:
    """Return the fastest route from `coordinator` and back; None if the model is not covered or cannot be reached.

    A stage may run fewer layers than its peer holds, so that overlapping spans fit together and slow peers get fewer
    layers.
    """
    speculation = speculation or Speculation()
    view = detour.without(view) if detour else view
    tables = tables_of(view, speculation.window_nodes, detour.kept if detour else frozenset(), _REFILL_LAYER_S)
    if not len(tables.names):
        return None
    there_s, back_s = (
        np.array([seconds if (seconds := view.link_s(*ends)) is not None else np.inf for ends in pairs])
        for pairs in (
            [(coordinator, name) for name in tables.names],
            [(name, coordinator) for name in tables.names],
        )
    )
    if len(tables.names) > _FAR_SWARM:
        near = tables.best_of_each_layer(there_s + back_s + tables.stage_s * (tables.last - tables.first), _NEAREST)
        near = np.union1d(near, [tables.index[each.peer] for each in tables.kept if each.peer in tables.index])
        near = near.astype(np.int64)
        tables, there_s, back_s = tables.only(near), there_s[near], back_s[near]
    return _Search(tables, there_s, back_s, speculation).best()


class _Search:
    """The search for one coordinator's best route."""

    def __init__(
        self, tables: Tables, there_s: NDArray[np.float64], back_s: NDArray[np.float64], speculation: Speculation
    ) -> None:
        self._tables = tables
        self._there_s, self._back_s = there_s, back_s
        self._speculation = speculation
        is_small = len(tables.names) <= _SMALL_SWARM
        self._tolerance = 0.0 if is_small else _TOLERANCE
        self._num_limits = _NUM_LIMITS if is_small else _FEW_LIMITS
        self._num_rounds = _MAX_ROUNDS if is_small else _FEW_ROUNDS
        self._num_steps = _MANY_STEPS if is_small else _FEW_STEPS
        self._relaxed_s = float("inf")
        self._plan: Plan | None = None

    def best(self) -> Plan | None:
        """Return the best route that visits no peer twice."""
        limits = self._limits()
        found = self._try(_spread(limits, self._num_limits))
        for _ in range(self._num_rounds):
            more = self._worth_trying(limits, found)
            if not more:
                break
            found |= self._try(more)
        if np.isfinite(self._relaxed_s) and (
            self._plan is None or self._plan.s_per_token > self._relaxed_s * (1 + self._tolerance)
        ):
            self._search_without_returns()
        return self._plan

    def _limits(self) -> NDArray[np.float64]:
        """Return the times of all stages that can be the slowest one, ascending."""
        tables = self._tables
        lengths = np.arange(1, int((tables.last - tables.first).max()) + 1)
        times = tables.pass_s[:, None] * lengths
        times = np.unique(times[lengths <= (tables.last - tables.first)[:, None]])
        # Each layer runs somewhere, so no limit below the slowest layer's fastest peer leaves a route.
        least_s = max((float(tables.pass_s[each].min()) for each in tables.active if len(each)), default=0.0)
        return times[times >= least_s]

    def _worth_trying(self, limits: NDArray[np.float64], found: dict[float, float]) -> list[float]:
        """Return limits inside the intervals that can hold a better route. found: the traversal of each limit tried."""
        speculation = self._speculation
        tried = sorted(found)
        intervals = []
        for low, high in zip([0.0, *tried], tried, strict=False):
            inside = limits[(limits > low) & (limits < high)]
            if not np.isfinite(found[high]) or not len(inside):
                continue
            bound_s = seconds_per_token(found[high], float(inside[0]), speculation)
            if bound_s < self._relaxed_s * (1 - self._tolerance) - 1e-12:
                intervals.append((bound_s, inside))
        intervals.sort(key=lambda each: each[0])
        share = max(1, self._num_limits // max(1, len(intervals)))
        return [limit for _, inside in intervals[: self._num_limits] for limit in _spread(inside, share)]

    def _try(self, limits: list[float]) -> dict[float, float]:
        """Search with each limit, keep the best route, and return the traversals."""
        tables = self._tables
        start_s = np.broadcast_to(self._there_s, (len(limits), len(self._there_s)))
        least = least_traversals(tables, start_s, np.array(limits))
        totals = least[:, :, -1] + self._back_s
        lasts = totals.argmin(axis=1)
        order = np.argsort(limits)
        found = {limits[row]: float(totals[row, lasts[row]]) for row in order.tolist()}
        # The slowest stage is above the limit before, or the route would have been found there.
        lower_s, before_s = 0.0, float("inf")
        routes = []
        for row, (limit, traversal_s) in zip(order.tolist(), found.items(), strict=True):
            if traversal_s < before_s - 1e-12:
                bound_s, most_s = (seconds_per_token(traversal_s, s, self._speculation) for s in (lower_s, limit))
                routes.append((most_s, bound_s, row))
            lower_s, before_s = limit, traversal_s
        for _, bound_s, row in sorted(routes):
            if bound_s < self._relaxed_s * (1 - self._tolerance):
                last = int(lasts[row])
                self._consider(trace(tables, self._there_s, least[row], last), float(totals[row, last]))
        return found

    def _consider(self, stages: tuple[PlannedStage, ...], traversal_s: float) -> None:
        tables = self._tables
        slowest_s = max(float(tables.pass_s[tables.index[each.peer]]) * each.span.num_layers for each in stages)
        cost_s = seconds_per_token(traversal_s, slowest_s, self._speculation)
        self._relaxed_s = min(self._relaxed_s, cost_s)
        comes_back = len({stage.peer for stage in stages}) < len(stages)
        if not comes_back and (self._plan is None or cost_s < self._plan.s_per_token):
            self._plan = Plan(stages=stages, traversal_s=traversal_s, slowest_s=slowest_s, s_per_token=cost_s)

    def _search_without_returns(self) -> None:
        """Search stage by stage, the most promising first, for a route that comes back to no peer.

        What is left of a route is bounded by its least traversal, in which peers may be visited twice.
        """
        tables = self._tables
        left_s = tables.least_left(self._back_s)
        num_left = self._num_steps

        def extend(stages: tuple[PlannedStage, ...], at: int, traversal_s: float, slowest_s: float) -> None:
            nonlocal num_left
            start = stages[-1].span.last if stages else 0
            if start == tables.num_layers:
                self._consider(stages, traversal_s + float(self._back_s[at]))
                return
            num_left -= 1
            used = {stage.peer for stage in stages}
            options = []
            for row in tables.active[start].tolist():
                link_s = float(self._there_s[row] if at < 0 else tables.link_s[at, row])
                if tables.names[row] in used or not np.isfinite(link_s):
                    continue
                for end in range(start + 1, int(tables.last[row]) + 1):
                    stage = PlannedStage(peer=tables.names[row], span=Span(start, end))
                    pass_s = float(tables.pass_s[row]) * (end - start)
                    stage_s = pass_s if stage in tables.kept else float(tables.stage_s[row]) * (end - start)
                    so_far_s, slower_s = traversal_s + link_s + stage_s, max(slowest_s, pass_s)
                    bound_s = seconds_per_token(so_far_s + float(left_s[row, end]), slower_s, self._speculation)
                    options.append((bound_s, row, stage, so_far_s, slower_s))
            options.sort(key=lambda option: option[:2])
            for bound_s, row, stage, so_far_s, slower_s in options:
                best_s = self._plan.s_per_token if self._plan else float("inf")
                if num_left <= 0 or bound_s >= best_s * (1 - self._tolerance / 2):
                    break
                extend((*stages, stage), row, so_far_s, slower_s)

        extend((), -1, 0.0, 0.0)


def _spread(limits: NDArray[np.float64], count: int = _NUM_LIMITS) -> list[float]:
    """Return up to `count` of these limits, evenly by rank, the greatest included."""
    places = np.unique(np.linspace(len(limits) - 1, 0, min(count, len(limits)) + 1)[:-1].round().astype(np.int64))
    return [float(limits[place]) for place in places]

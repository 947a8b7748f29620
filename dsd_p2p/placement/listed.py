"""Finds a route that covers a model, among stages that were started by hand."""

import itertools
from collections.abc import Iterable

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import PeerInfo, short_peer


def even_spans(num_layers: int, num_stages: int) -> list[tuple[int, int]]:
    """Split `num_layers` into `num_stages` half-open spans whose lengths differ by at most one.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"stages: expected 1 to {num_layers}, one per layer at most, got {num_stages}")
    bounds = [num_layers * index // num_stages for index in range(num_stages + 1)]
    return list(itertools.pairwise(bounds))


def balanced_spans(num_layers: int, num_stages: int, head_layers: float) -> list[tuple[int, int]]:
    """Split `num_layers` into `num_stages` half-open spans such that the largest share of the work is smallest.

    head_layers: as many layers are as much work as the LM head, which the last stage has besides its layers.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    if num_stages < 2 or num_layers <= num_stages:
        return even_spans(num_layers, num_stages)
    others = num_stages - 1
    last = min(
        range(1, num_layers - others + 1),
        key=lambda count: (max(-(-(num_layers - count) // others), count + head_layers), -count),
    )
    return [*even_spans(num_layers - last, others), (num_layers - last, num_layers)]


def choose_listed_route(peers: Iterable[PeerInfo]) -> list[PeerInfo]:
    """Return the route with the fewest stages that covers all layers of one model.

    Raises:
        ConfigError: no stage is known, or the stages leave layers uncovered or hold different models; says which.
    """
    stages = [peer for peer in peers if peer.span is not None]
    if not stages:
        raise ConfigError("no connected peer serves a stage: connect to a peer started with `dsd node --span`")
    models = {peer.model for peer in stages}
    routes = [_shortest([p for p in stages if p.model == model]) for model in sorted(models, key=str)]
    complete = [route for route in routes if route and _end(route) == route[0].num_layers]
    if complete:
        return min(complete, key=len)
    if len(models) > 1:
        described = "; ".join(f"{short_peer(p.peer)} {p.span} {p.model_name} {p.model}" for p in stages)
        raise ConfigError(f"the stages serve different models: {described}; start all of them with the same model")
    raise ConfigError(
        f"layers from {max(map(_end, routes))} of {stages[0].num_layers} are not covered by a connected stage: "
        "start one with `dsd node --span`"
    )


def _shortest(stages: list[PeerInfo]) -> list[PeerInfo]:
    """Search breadth-first from layer 0 and return the route that gets furthest."""
    best: list[PeerInfo] = []
    frontier: list[list[PeerInfo]] = [[]]
    reached = {0}
    while frontier:
        longer = []
        for route in frontier:
            for stage in stages:
                span = stage.span
                if span is not None and span.first == _end(route) and span.last not in reached:
                    reached.add(span.last)
                    longer.append([*route, stage])
        best = max([best, *longer], key=_end)
        frontier = longer
    return best


def _end(route: list[PeerInfo]) -> int:
    return route[-1].span.last if route and route[-1].span is not None else 0

"""Finds a route of stages that covers a model."""

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
        raise ConfigError(f"{num_stages} stages: this model's {num_layers} layers allow 1..{num_layers}")
    bounds = [num_layers * index // num_stages for index in range(num_stages + 1)]
    return list(itertools.pairwise(bounds))


def choose_listed_route(peers: Iterable[PeerInfo]) -> list[PeerInfo]:
    """Return the shortest route of stages of one model that covers all its layers.

    Raises:
        ConfigError: no stage is known, or they leave layers uncovered or disagree on the model: says which.
    """
    stages = [peer for peer in peers if peer.span is not None]
    if not stages:
        raise ConfigError("none of the connected peers hosts a stage: connect to a node started with --span")
    models = {peer.model for peer in stages}
    routes = [_shortest([p for p in stages if p.model == model]) for model in sorted(models, key=str)]
    complete = [route for route in routes if route and _end(route) == route[0].num_layers]
    if complete:
        return min(complete, key=len)
    if len(models) > 1:
        described = "; ".join(f"{short_peer(p.peer)} {p.span} {p.model_name} {p.model}" for p in stages)
        raise ConfigError(f"the stages hold different models: {described}; start them with one model")
    raise ConfigError(
        f"layers from {max(map(_end, routes))} of {stages[0].num_layers} are not covered by a connected stage: "
        "start a node with that span"
    )


def _shortest(stages: list[PeerInfo]) -> list[PeerInfo]:
    """Breadth first from layer 0; returns the route that gets furthest."""
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

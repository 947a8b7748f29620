"""Predicts what each span that a newcomer could hold would do for the routes of a swarm, for all spans at once.

How it works. A route that uses the newcomer is a route to it, its stage, and a route from it. The first part does not
depend on the newcomer's span, nor does the last. So both are searched once, for several coordinators and limits on the
slowest stage, and each span only chooses where to cut.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.placement.search import Floats, Tables, least_traversals, tables_of
from dsd_p2p.placement.view import PeerView, Speculation, SwarmView
from dsd_p2p.types import Span

_MAX_COORDINATORS, _MAX_STATES = 24, 6000
"""Peers that routes are searched from. In a large swarm fewer, so that peers times searches stay below the second."""

_NUM_LIMITS, _FEW_LIMITS = 24, 8
"""Limits on the slowest stage, in a small and in a large swarm."""

_NEAREST, _LARGE_SWARM = 16, 64
"""In a swarm of more peers, only so many of them are considered for each layer: the most central and fastest."""


def span_costs(others: SwarmView, me: PeerView, spans: Sequence[Span], speculation: Speculation) -> NDArray[np.float64]:
    """Return for each span the seconds per token of the best route, averaged over the peers that could start it.

    others: the swarm without the newcomer. A peer without a route counts as one second.
    """
    tables = tables_of(others, speculation.window_nodes)
    if len(tables.names) > _LARGE_SWARM:
        to_others_s = np.where(np.isfinite(tables.link_s), tables.link_s, np.nan)
        scores = np.nanmean(to_others_s, axis=1) + tables.stage_s * (tables.last - tables.first)
        tables = tables.only(tables.best_of_each_layer(np.nan_to_num(scores, nan=np.inf), _NEAREST))
    pass_s = me.layer_pass_s(speculation.window_nodes)
    coordinators = _coordinators(others, me)
    limits = _limits(tables, pass_s, max(span.num_layers for span in spans))
    there, back = _links(others, tables, coordinators)
    to_me, from_me = _links_of(others, me, tables, coordinators)
    least, through = _through(tables, (there, back), (to_me, from_me), limits, pass_s, others.num_layers)
    best = np.full((len(spans), len(coordinators)), np.inf)
    for row, span in enumerate(spans):
        inside = through[:, :, span.first : span.last, span.first + 1 : span.last + 1]
        traversal_s = np.minimum(least, inside.min(axis=(2, 3)))
        cost_s = (1 - speculation.coverage) * traversal_s + speculation.coverage * np.maximum(
            limits, speculation.draft_s
        )
        best[row] = cost_s.min(axis=1)
    has_route = np.isfinite(best)
    costs: NDArray[np.float64] = np.where(has_route, best, 1.0).mean(axis=1)
    return costs


def _coordinators(others: SwarmView, me: PeerView) -> list[str]:
    names = sorted(peer.peer for peer in others.peers)
    count = min(len(names), _MAX_COORDINATORS, max(4, _MAX_STATES // max(1, len(names))))
    places = np.linspace(0, len(names) - 1, count).round().astype(np.int64)
    return [*(names[place] for place in sorted(set(places.tolist()))), me.peer]


def _limits(tables: Tables, pass_s: float, longest: int) -> Floats:
    """Return limits on the slowest stage, from the least that leaves a route to the greatest that a stage takes."""
    lengths = tables.last - tables.first
    greatest_s = max([*(tables.pass_s * lengths).tolist(), pass_s * longest])
    fastest_s = [float(tables.pass_s[each].min()) for each in tables.active if len(each)]
    least_s = min(max(fastest_s, default=pass_s), greatest_s)
    count = _FEW_LIMITS if len(tables.names) > _LARGE_SWARM else _NUM_LIMITS
    return np.geomspace(max(least_s, 1e-9), greatest_s, count)


def _links(view: SwarmView, tables: Tables, coordinators: Sequence[str]) -> tuple[Floats, Floats]:
    """Return the seconds from each coordinator to each peer with layers, `[C, P]`, and back."""
    there = [[_seconds(view, each, name) for name in tables.names] for each in coordinators]
    back = [[_seconds(view, name, each) for name in tables.names] for each in coordinators]
    return np.array(there).reshape(len(coordinators), -1), np.array(back).reshape(len(coordinators), -1)


def _links_of(
    view: SwarmView, me: PeerView, tables: Tables, coordinators: Sequence[str]
) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Return the seconds to the newcomer from each coordinator and each peer, and the seconds from it."""
    to_me = tuple(np.array([_seconds(view, each, me.peer) for each in names]) for names in (coordinators, tables.names))
    from_me = tuple(
        np.array([_seconds(view, me.peer, each) for each in names]) for names in (coordinators, tables.names)
    )
    return (to_me[0], to_me[1]), (from_me[0], from_me[1])


def _through(
    tables: Tables,
    ends: tuple[Floats, Floats],
    links: tuple[tuple[Floats, Floats], tuple[Floats, Floats]],
    limits: Floats,
    pass_s: float,
    num_layers: int,
) -> tuple[Floats, Floats]:
    """Return the least traversals without the newcomer, `[C, T]`, and with its stage [s, e), `[C, T, s, e]`."""
    (there, back), (to_me, from_me) = ends, links
    num_starts, num_limits = len(there), len(limits)
    shape = (num_starts, num_limits)
    every_limit = np.tile(limits, num_starts)

    def search(table: Tables, start: Floats) -> Floats:
        return least_traversals(table, np.repeat(start, num_limits, axis=0), every_limit)

    if len(tables.names):
        forward, backward = search(tables, there), search(tables.reversed(), back)
        least = (forward[:, :, num_layers] + np.repeat(back, num_limits, axis=0)).min(axis=1).reshape(shape)
        arriving = (forward + to_me[1][None, :, None]).min(axis=1).reshape(*shape, -1)
        leaving = (backward + from_me[1][None, :, None]).min(axis=1)[:, ::-1].reshape(*shape, -1)
    else:
        least = np.full(shape, np.inf)
        arriving = leaving = np.full((*shape, num_layers + 1), np.inf)
    arriving, leaving = arriving.copy(), leaving.copy()
    arriving[:, :, 0], leaving[:, :, num_layers] = to_me[0][:, None], from_me[0][:, None]
    length = np.arange(num_layers + 1)[None] - np.arange(num_layers + 1)[:, None]
    stage_s = np.where(length > 0, pass_s * length, np.inf)
    through = arriving[:, :, :, None] + stage_s + leaving[:, :, None, :]
    through[:, stage_s[None] > limits[:, None, None] * (1 + 1e-9)] = np.inf
    return least, through


def _seconds(view: SwarmView, a: str, b: str) -> float:
    seconds = view.link_s(a, b)
    return np.inf if seconds is None else seconds

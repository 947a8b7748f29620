"""Chooses the peer that coordinates a request: it drafts, sends windows and receives verdicts."""

import statistics
from collections.abc import Collection, Mapping

from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.view import Plan, Speculation, SwarmView, seconds_per_token
from dsd_p2p.types import PeerId

_MIN_GAIN = 1.1
"""Another peer must be this much faster than the client itself, because handing over adds a hop and a dependency."""

_MAX_CANDIDATES = 6
"""Peers whose routes are searched: those that seem fastest by their drafters and by their links to all others."""

USUAL_TRAVERSAL_S = 0.2
"""The traversal by which peers and drafters are compared while no route is known."""

_NGRAM_COVERAGE, MODEL_COVERAGE, _SHADOW_COVERAGE = 0.5, 0.9, 0.97
"""How often a level of the draft tree holds the target's token: for prompt lookup on novel text, for a model, and for the
target itself in int8 (docs/benchmarks.md)."""


def speculation_of(drafter: str, step_s: float = 0.0) -> Speculation:
    """Return the expected speculation of the named drafter. step_s: seconds of one of its steps."""
    return Speculation(coverage=expected_coverage(drafter), draft_s=step_s)


def expected_coverage(drafter: str) -> float:
    """Return how often a level of the named drafter's tree is expected to hold the target's token."""
    if drafter == "ngram":
        return _NGRAM_COVERAGE
    return _SHADOW_COVERAGE if drafter.partition("+")[0] == "shadow" else MODEL_COVERAGE


def choose_coordinator(
    view: SwarmView, client: PeerId, capable: Mapping[PeerId, Speculation], avoid: Collection[str] = ()
) -> tuple[PeerId, Plan] | None:
    """Return the peer whose best route is fastest, and that route; None if no peer has a route.

    capable: the peers that can draft and how well, including the client itself if it can. avoid: peers not to choose.
    """
    best: tuple[PeerId, Plan] | None = None
    own = choose_route(view, client, capable[client]) if client in capable else None
    if own is not None:
        best = client, own
    others = [
        peer
        for peer in sorted(capable)
        if peer != client and peer not in avoid and view.link_s(client, peer) is not None
    ]
    between_s = USUAL_TRAVERSAL_S if own is None else own.traversal_s
    others.sort(key=lambda peer: seconds_per_token(between_s + 2 * _usual_link_s(view, peer), 0.0, capable[peer]))
    num_searched = 0
    for peer in others:
        plan = choose_route(view, peer, capable[peer])
        if plan is None:
            continue
        num_searched += 1
        bar = float("inf") if best is None else best[1].s_per_token / (_MIN_GAIN if best[0] == client else 1.0)
        if plan.s_per_token < bar:
            best = peer, plan
        if num_searched == _MAX_CANDIDATES:
            break
    return best


def _usual_link_s(view: SwarmView, peer: PeerId) -> float:
    """Return the median of a peer's links to all others."""
    links = [
        seconds for each in view.peers if each.peer != peer and (seconds := view.link_s(peer, each.peer)) is not None
    ]
    return statistics.median(links) if links else float("inf")

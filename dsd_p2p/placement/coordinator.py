"""Which peer coordinates a request: drafts, sends windows and takes verdicts in."""

from collections.abc import Collection, Mapping

from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.view import Plan, Speculation, SwarmView
from dsd_p2p.types import PeerId

_MIN_GAIN = 1.1
"""A peer other than the client itself must be this much faster: handing over costs a hop and a dependency."""


_NGRAM_COVERAGE, MODEL_COVERAGE = 0.5, 0.9
"""Share of levels at which a drafter's tree holds the true token: prompt lookup on novel text, a model (docs/benchmarks.md)."""


def speculation_of(drafter: str) -> Speculation:
    """Return what to expect of a drafter, by its name."""
    return Speculation(coverage=_NGRAM_COVERAGE if drafter == "ngram" else MODEL_COVERAGE)


def choose_coordinator(
    view: SwarmView, client: PeerId, capable: Mapping[PeerId, Speculation], avoid: Collection[str] = ()
) -> tuple[PeerId, Plan] | None:
    """Return the peer with the fastest loop through its best route, and that route; None when nobody has one.

    capable: peers that draft, and how well; the client itself only if it does.
    """
    best: tuple[PeerId, Plan] | None = None
    own = choose_route(view, client, capable[client]) if client in capable else None
    if own is not None:
        best = client, own
    for peer, speculation in sorted(capable.items()):
        if peer == client or peer in avoid or view.link_s(client, peer) is None:
            continue
        plan = choose_route(view, peer, speculation)
        if plan is None:
            continue
        bar = float("inf") if best is None else best[1].s_per_token / (_MIN_GAIN if best[0] == client else 1.0)
        if plan.s_per_token < bar:
            best = peer, plan
    return best

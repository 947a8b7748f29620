"""Which peer coordinates a request: drafts, sends windows and takes verdicts in."""

from collections.abc import Iterable

from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.view import Plan, Speculation, SwarmView
from dsd_p2p.types import PeerId

_MIN_GAIN = 1.1
"""A peer other than the client itself must be this much faster: handing over costs a hop and a dependency."""


def choose_coordinator(
    view: SwarmView, client: PeerId, capable: Iterable[PeerId], speculation: Speculation | None = None
) -> tuple[PeerId, Plan] | None:
    """Return the peer with the shortest loop through its best chain, and that chain; None when nobody has one.

    capable: peers that draft. The client is always one of them.
    """
    best: tuple[PeerId, Plan] | None = None
    own = choose_route(view, client, speculation)
    if own is not None:
        best = client, own
    for peer in sorted(capable):
        if peer == client or view.link_s(client, peer) is None:
            continue
        plan = choose_route(view, peer, speculation)
        if plan is None:
            continue
        bar = float("inf") if best is None else best[1].s_per_token / (_MIN_GAIN if best[0] == client else 1.0)
        if plan.s_per_token < bar:
            best = peer, plan
    return best

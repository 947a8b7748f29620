"""Searches all routes of a small swarm one by one: what the fast search is measured against."""

from collections.abc import Iterator

from dsd_p2p.placement.view import PeerView, PlannedStage, Speculation, SwarmView, seconds_per_token
from dsd_p2p.types import Span


def best_cost_s(view: SwarmView, coordinator: str, speculation: Speculation) -> float:
    """Return the seconds per token of the best route that visits no peer twice; infinite if there is none.

    A branch ends where even free links and passes behind it could not beat the best route so far.
    """
    best = float("inf")
    holders = [peer for peer in view.peers if peer.span is not None]

    def extend(at: str, start: int, used: frozenset[str], traversal_s: float, slowest_s: float) -> None:
        nonlocal best
        if seconds_per_token(traversal_s, slowest_s, speculation) >= best:
            return
        if start == view.num_layers:
            back_s = view.link_s(at, coordinator)
            if back_s is not None:
                best = min(best, seconds_per_token(traversal_s + back_s, slowest_s, speculation))
            return
        for stage, pass_s, link_s in sorted(
            _next(view, holders, at, start, used, speculation), key=lambda each: each[2]
        ):
            extend(
                stage.peer,
                stage.span.last,
                used | {stage.peer},
                traversal_s + link_s + pass_s,
                max(slowest_s, pass_s),
            )

    extend(coordinator, 0, frozenset(), 0.0, 0.0)
    return best


def _next(
    view: SwarmView, holders: list[PeerView], at: str, start: int, used: frozenset[str], speculation: Speculation
) -> Iterator[tuple[PlannedStage, float, float]]:
    for peer in holders:
        span, link_s = peer.span, view.link_s(at, peer.peer)
        if span is None or link_s is None or peer.peer in used or not span.first <= start < span.last:
            continue
        layer_s = peer.layer_pass_s(speculation.window_nodes)
        for end in range(span.last, start, -1):
            yield PlannedStage(peer=peer.peer, span=Span(start, end)), layer_s * (end - start), link_s

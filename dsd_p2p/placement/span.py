"""Chooses the layers that a peer should hold, when it joins and when a gap opens. Peers move only to close a gap."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.view import PeerView, Speculation, SwarmView
from dsd_p2p.types import PeerId, Span

_MAX_EVALUATED = 24
"""Maximum number of spans whose routes are searched; coverage decides which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of the layers that a peer holds."""

    peer: PeerId
    span: Span


def choose_span(view: SwarmView, me: PeerView, speculation: Speculation | None = None) -> Span:
    """Return the span with which `me`, a peer that holds nothing yet, improves the swarm most.

    Closing gaps comes first. Once all layers are covered, the criterion is the predicted seconds per token of the best
    route, averaged over the peers that it could start from, and then the layers that the fewest peers hold.
    """
    others = replace(view, peers=tuple(peer for peer in view.peers if peer.peer != me.peer))
    holders = _holders(others)
    length = max(1, min(me.max_layers, view.num_layers))
    candidates = [Span(first, first + length) for first in range(view.num_layers - length + 1)]

    def need(span: Span) -> tuple[int, float, int]:
        layers = range(span.first, span.last)
        num_gaps = sum(holders[layer] == 0 for layer in layers)
        # Layers with few holders weigh more. Ties go to the front, which leaves no gap in between.
        scarcity = sum(1 / (1 + holders[layer]) ** 2 for layer in layers)
        return -num_gaps, -scarcity, span.first

    candidates.sort(key=need)
    most_gaps = need(candidates[0])[0]
    if most_gaps < 0:
        # Of the spans that cover most of the gaps, take one that leaves the fewest pieces, then the frontmost.
        candidates = [span for span in candidates if need(span)[0] == most_gaps]
        return min(candidates, key=lambda span: (_pieces(holders, span), span.first))
    return min(candidates[:_MAX_EVALUATED], key=lambda span: (_cost_s(others, me, span, speculation), need(span)))


def choose_move(view: SwarmView, speculation: Speculation | None = None) -> Move | None:
    """Return the move that closes gaps best, or None if no move helps. Peers with the same view get the same answer.

    Among the moves that leave the fewest layers uncovered, it loads the fewest layers, then gives up the fewest, then
    computes the least.
    """
    num_gaps = len(view.uncovered())
    if not num_gaps:
        return None
    best: tuple[int, int, int, float, str] | None = None
    chosen: Move | None = None
    for peer in sorted(view.peers, key=lambda peer: peer.peer):
        for span in _spans_around(peer, view):
            moved = replace(view, peers=tuple(replace(n, span=span) if n.peer == peer.peer else n for n in view.peers))
            num_given_up = _num_new(span, peer.span) if peer.span else 0
            num_loaded = _num_new(peer.span, span)
            key = (len(moved.uncovered()), num_loaded, num_given_up, peer.layer_s * span.num_layers, peer.peer)
            if key[0] < num_gaps and (best is None or key < best):
                best, chosen = key, Move(peer=peer.peer, span=span)
    return chosen


def _spans_around(peer: PeerView, view: SwarmView) -> Iterator[Span]:
    """Yield every span that the peer has room for."""
    longest = max(1, min(peer.max_layers, view.num_layers))
    for first in range(view.num_layers):
        for last in range(first + 1, min(first + longest, view.num_layers) + 1):
            yield Span(first, last)


def _num_new(old: Span | None, new: Span) -> int:
    kept = 0 if old is None else max(0, min(old.last, new.last) - max(old.first, new.first))
    return new.num_layers - kept


def _holders(view: SwarmView) -> list[int]:
    holders = [0] * view.num_layers
    for peer in view.peers:
        if peer.span is not None:
            for layer in range(peer.span.first, peer.span.last):
                holders[layer] += 1
    return holders


def _pieces(holders: list[int], span: Span) -> int:
    """Return how many separate gaps would be left."""
    left = [holders[layer] == 0 and not span.first <= layer < span.last for layer in range(len(holders))]
    return sum(is_gap and (index == 0 or not left[index - 1]) for index, is_gap in enumerate(left))


def _cost_s(others: SwarmView, me: PeerView, span: Span, speculation: Speculation | None) -> float:
    view = replace(others, peers=(*others.peers, replace(me, span=span)))
    plans = [choose_route(view, peer.peer, speculation) for peer in view.peers]
    return math.fsum(plan.s_per_token for plan in plans if plan is not None) / len(plans) + sum(
        plan is None for plan in plans
    )

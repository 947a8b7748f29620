"""Which layers a peer should hold: when it joins, and when a gap opens. Sticky: nothing moves for less than a gap."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.view import PeerView, Speculation, SwarmView
from dsd_p2p.types import PeerId, Span

_MAX_EVALUATED = 24
"""Spans whose routes are searched; the rest is sorted out by coverage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A peer that should hold other layers from now on."""

    peer: PeerId
    span: Span


def choose_span(view: SwarmView, me: PeerView, speculation: Speculation | None = None) -> Span:
    """Return the span with which `me`, who holds nothing yet, improves the swarm most.

    Uncovered layers count first; once all are covered, the predicted seconds a token of the best route, averaged over the peers
    it could start from; then the layers that fewest peers hold.
    """
    others = replace(view, peers=tuple(node for node in view.peers if node.peer != me.peer))
    holders = _holders(others)
    length = max(1, min(me.max_layers, view.num_layers))
    candidates = [Span(first, first + length) for first in range(view.num_layers - length + 1)]

    def need(span: Span) -> tuple[int, float, int]:
        layers = range(span.first, span.last)
        num_gaps = sum(holders[layer] == 0 for layer in layers)
        # Few holders weigh more than many; where all is alike, from the front on, without leaving a gap in between.
        scarcity = sum(1 / (1 + holders[layer]) ** 2 for layer in layers)
        return -num_gaps, -scarcity, span.first

    candidates.sort(key=need)
    most_gaps = need(candidates[0])[0]
    if most_gaps < 0:
        # The frontmost of those that close most: gaps stay in one piece.
        candidates = [span for span in candidates if need(span)[0] == most_gaps]
        return min(candidates, key=lambda span: (_pieces(holders, span), span.first))
    return min(candidates[:_MAX_EVALUATED], key=lambda span: (_cost_s(others, me, span, speculation), need(span)))


def choose_move(view: SwarmView, speculation: Speculation | None = None) -> Move | None:
    """Return who should move to close a gap, the same answer for all who share the view; None when nothing can be mended.

    The move that leaves the fewest layers uncovered, then loads the fewest, then gives up the fewest, then computes the least.
    """
    num_gaps = len(view.uncovered())
    if not num_gaps:
        return None
    best: tuple[int, int, int, float, str] | None = None
    chosen: Move | None = None
    for node in sorted(view.peers, key=lambda node: node.peer):
        for span in _spans_around(node, view):
            moved = replace(view, peers=tuple(replace(n, span=span) if n.peer == node.peer else n for n in view.peers))
            num_given_up = _num_new(span, node.span) if node.span else 0
            num_loaded = _num_new(node.span, span)
            key = (len(moved.uncovered()), num_loaded, num_given_up, node.layer_s * span.num_layers, node.peer)
            if key[0] < num_gaps and (best is None or key < best):
                best, chosen = key, Move(peer=node.peer, span=span)
    return chosen


def _spans_around(node: PeerView, view: SwarmView) -> Iterator[Span]:
    """Every span the peer has room for; a peer that holds something extends it first."""
    longest = max(1, min(node.max_layers, view.num_layers))
    for first in range(view.num_layers):
        for last in range(first + 1, min(first + longest, view.num_layers) + 1):
            yield Span(first, last)


def _num_new(old: Span | None, new: Span) -> int:
    kept = 0 if old is None else max(0, min(old.last, new.last) - max(old.first, new.first))
    return new.num_layers - kept


def _holders(view: SwarmView) -> list[int]:
    holders = [0] * view.num_layers
    for node in view.peers:
        if node.span is not None:
            for layer in range(node.span.first, node.span.last):
                holders[layer] += 1
    return holders


def _pieces(holders: list[int], span: Span) -> int:
    """How many gaps would be left."""
    left = [holders[layer] == 0 and not span.first <= layer < span.last for layer in range(len(holders))]
    return sum(is_gap and (index == 0 or not left[index - 1]) for index, is_gap in enumerate(left))


def _cost_s(others: SwarmView, me: PeerView, span: Span, speculation: Speculation | None) -> float:
    view = replace(others, peers=(*others.peers, replace(me, span=span)))
    plans = [choose_route(view, node.peer, speculation) for node in view.peers]
    return math.fsum(plan.s_per_token for plan in plans if plan is not None) / len(plans) + sum(
        plan is None for plan in plans
    )

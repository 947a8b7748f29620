"""Chooses the layers that a peer should hold, when it joins and when a gap opens. Peers move only to close a gap."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.placement.joining import span_costs
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
    candidates = candidates[:_MAX_EVALUATED]
    costs = span_costs(others, me, candidates, speculation or Speculation())
    return min(zip(costs.tolist(), map(need, candidates), candidates, strict=True), key=lambda each: each[:2])[2]


def choose_move(view: SwarmView, speculation: Speculation | None = None) -> Move | None:
    """Return the move that closes gaps best, or None if no move helps. Peers with the same view get the same answer.

    Among the moves that leave the fewest layers uncovered, it loads the fewest layers, then gives up the fewest, then
    computes the least.
    """
    num_gaps = len(view.uncovered())
    if not num_gaps:
        return None
    best: tuple[tuple[float, ...], str] | None = None
    chosen: Move | None = None
    holders = np.array(_holders(view))
    for peer in sorted(view.peers, key=lambda peer: peer.peer):
        firsts, lasts = _spans_around(peer, view)
        is_own = np.zeros(view.num_layers, np.int64)
        if peer.span is not None:
            is_own[peer.span.first : peer.span.last] = 1
        own = np.concatenate([[0], np.cumsum(is_own)])
        gaps = np.concatenate([[0], np.cumsum(holders - is_own == 0)])
        num_kept, lengths = own[lasts] - own[firsts], lasts - firsts
        keys = np.stack(
            [
                gaps[-1] - (gaps[lasts] - gaps[firsts]),
                lengths - num_kept,
                own[-1] - num_kept,
                peer.layer_s * lengths,
            ]
        )
        place = int(np.lexsort(keys[::-1])[0])
        key = (tuple(keys[:, place].tolist()), peer.peer)
        if key[0][0] < num_gaps and (best is None or key < best):
            best, chosen = key, Move(peer=peer.peer, span=Span(int(firsts[place]), int(lasts[place])))
    return chosen


def _spans_around(peer: PeerView, view: SwarmView) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and last layers of every span that the peer has room for."""
    firsts, lasts = np.triu_indices(view.num_layers + 1, 1)
    fits = lasts - firsts <= max(1, min(peer.max_layers, view.num_layers))
    return firsts[fits], lasts[fits]


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

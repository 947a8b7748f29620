"""The view of a swarm that placement decides on, and the prediction of a route's seconds per token."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import PeerId, Span

WIDE_WINDOW_NODES = 16
"""Positions in the wider of the two passes that peers measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """A peer that can hold layers.

    span: the layers it holds, or None. max_layers: how many fit in its memory.
    layer_s, layer16_s: seconds per layer over 1 and over 16 positions. num_sessions: sessions that it serves now.
    """

    peer: PeerId
    span: Span | None = None
    max_layers: int
    layer_s: float
    layer16_s: float
    num_sessions: int = 0

    def layer_pass_s(self, num_nodes: int) -> float:
        """Return the seconds of one layer over `num_nodes` while the peer also serves its sessions."""
        slope = (self.layer16_s - self.layer_s) / (WIDE_WINDOW_NODES - 1)
        return max(1e-9, self.layer_s + max(0.0, slope) * (num_nodes - 1)) * (1 + self.num_sessions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How a request will speculate on a route.

    coverage: how often a level of the draft tree holds the target's token. window_nodes: nodes per window.
    draft_s: seconds per draft step.
    """

    coverage: float = 0.9
    window_nodes: int = 8
    draft_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SwarmView:
    """The peers of a swarm, the layers of its model, and the links between the peers.

    one_way_s: seconds from one peer to another; a missing pair has no link.
    """

    num_layers: int
    peers: tuple[PeerView, ...]
    one_way_s: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def link_s(self, a: str, b: str) -> float | None:
        """Return the seconds one way from `a` to `b`; 0 to itself, None without a link."""
        return 0.0 if a == b else self.one_way_s.get((a, b))

    @cached_property
    def link_matrix(self) -> NDArray[np.float64]:
        """Seconds one way between the peers, `[P, P]` in their order; infinite without a link and on the diagonal."""
        index: dict[str, int] = {peer.peer: place for place, peer in enumerate(self.peers)}
        matrix = np.full((len(index), len(index)), np.inf)
        for (a, b), seconds in self.one_way_s.items():
            if a in index and b in index and a != b:
                matrix[index[a], index[b]] = seconds
        return matrix

    def uncovered(self) -> list[int]:
        """Return the layers that no peer holds."""
        covered = {layer for peer in self.peers if peer.span for layer in range(peer.span.first, peer.span.last)}
        return [layer for layer in range(self.num_layers) if layer not in covered]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A peer and the layers it runs in a route, which may be fewer than it holds."""

    peer: PeerId
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A route with predicted times: of one traversal, of the slowest stage, and per token with speculation."""

    stages: tuple[PlannedStage, ...]
    traversal_s: float
    slowest_s: float
    s_per_token: float


def seconds_per_token(traversal_s: float, slowest_s: float, speculation: Speculation) -> float:
    """Return the seconds per token: a level time if the tree holds it, else a traversal (docs/structures.md)."""
    level_s = max(slowest_s, speculation.draft_s)
    return (1 - speculation.coverage) * traversal_s + speculation.coverage * level_s

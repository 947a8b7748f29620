"""What placement knows of a swarm, and what it predicts from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsd_p2p.types import PeerId, Span

WIDE_WINDOW_NODES = 16
"""Positions of the wider of the two passes that nodes measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """One peer that could hold layers.

    span: what it holds; None nothing. max_layers: what its memory has room for.
    layer_s, layer16_s: seconds of one layer over 1 and over 16 positions. num_sessions: that it serves right now.
    """

    peer: PeerId
    span: Span | None = None
    max_layers: int
    layer_s: float
    layer16_s: float
    num_sessions: int = 0

    def layer_pass_s(self, num_nodes: int) -> float:
        """Seconds of one layer over `num_nodes`, sharing the peer with its sessions."""
        slope = (self.layer16_s - self.layer_s) / (WIDE_WINDOW_NODES - 1)
        return max(1e-9, self.layer_s + max(0.0, slope) * (num_nodes - 1)) * (1 + self.num_sessions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How a route is going to be used.

    coverage: share of levels at which the true token is inside the draft tree. window_nodes: of one window.
    draft_s: of one draft step.
    """

    coverage: float = 0.9
    window_nodes: int = 8
    draft_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmView:
    """Peers, the model they serve and the links between them.

    one_way_s: seconds from one peer to another; a pair that is missing cannot talk.
    """

    num_layers: int
    peers: tuple[PeerView, ...]
    one_way_s: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def link_s(self, a: str, b: str) -> float | None:
        """Seconds one way; 0 to oneself, None where there is no way."""
        return 0.0 if a == b else self.one_way_s.get((a, b))

    def uncovered(self) -> list[int]:
        """Layers that no peer holds."""
        covered = {layer for node in self.peers if node.span for layer in range(node.span.first, node.span.last)}
        return [layer for layer in range(self.num_layers) if layer not in covered]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A peer and the layers it runs in a route, which may be fewer than it holds."""

    peer: PeerId
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A route and its prediction: one traversal, the slowest stage, seconds a token with speculation."""

    stages: tuple[PlannedStage, ...]
    traversal_s: float
    slowest_s: float
    s_per_token: float


def seconds_per_token(traversal_s: float, slowest_s: float, speculation: Speculation) -> float:
    """Return what a token costs: one level where the tree holds it, a traversal where it does not (docs/structures.md)."""
    level_s = max(slowest_s, speculation.draft_s)
    return (1 - speculation.coverage) * traversal_s + speculation.coverage * level_s

"""Which peers and links a request's next route should leave out, and for how long."""

import logging

from dsd_p2p.errors import DsdError
from dsd_p2p.placement.route import Detour
from dsd_p2p.placement.view import PlannedStage
from dsd_p2p.session.request import Route
from dsd_p2p.types import PeerId

logger = logging.getLogger(__name__)

_PEER_S = 30.0
"""A peer that failed a request is left out of its routes this long: longer than any of the request's retries takes."""

_LINK_S = 5.0
"""Heartbeats tell of a broken link by then."""


class Avoided:
    """What one request has met with. Times in seconds on trio's clock."""

    def __init__(self) -> None:
        self._peers: dict[str, float] = {}
        self._links: dict[tuple[str, str], float] = {}

    def peer(self, peer: PeerId, error: DsdError, now_s: float) -> None:
        """Leave a peer out: it failed with `error`."""
        logger.warning("stage avoided peer=%s error=%s", peer, error)
        self._peers[peer] = now_s + _PEER_S

    def link(self, one: str, other: str, now_s: float) -> None:
        """Leave the connection between two stages out."""
        self._links[one, other] = now_s + _LINK_S

    def detour(self, present: Route, now_s: float) -> Detour:
        """Return what the next route must avoid, and which stages hold something of the session."""
        return Detour(
            peers=frozenset(peer for peer, until_s in self._peers.items() if until_s > now_s),
            links=frozenset(link for link, until_s in self._links.items() if until_s > now_s),
            kept=frozenset(PlannedStage(peer=PeerId(hop.peer), span=hop.span) for hop in present.hops),
        )

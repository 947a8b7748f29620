"""Remembers which peers and links a request's next route should avoid, and for how long."""

import logging

from dsd_p2p.errors import DsdError
from dsd_p2p.placement.route import Detour
from dsd_p2p.placement.view import PlannedStage
from dsd_p2p.session.request import Route
from dsd_p2p.types import PeerId

logger = logging.getLogger(__name__)

_PEER_S = 30.0
"""How long a request avoids a peer that failed it: longer than any of its retries takes."""

_LINK_S = 5.0
"""How long a request avoids a link: by then heartbeats report that it is broken."""


class Avoided:
    """The peers and links that failed one request. Times are seconds on trio's clock."""

    def __init__(self) -> None:
        self._peers: dict[str, float] = {}
        self._links: dict[tuple[str, str], float] = {}

    def peer(self, peer: PeerId, error: DsdError, now_s: float) -> None:
        """Avoid a peer, which failed with `error`."""
        logger.warning("stage avoided peer=%s error=%s", peer, error)
        self._peers[peer] = now_s + _PEER_S

    def link(self, one: str, other: str, now_s: float) -> None:
        """Avoid the connection between two stages."""
        self._links[one, other] = now_s + _LINK_S

    def detour(self, present: Route, now_s: float) -> Detour:
        """Return what the next route must avoid, and the stages it should keep, which hold the session's state."""
        return Detour(
            peers=frozenset(peer for peer, until_s in self._peers.items() if until_s > now_s),
            links=frozenset(link for link, until_s in self._links.items() if until_s > now_s),
            kept=frozenset(PlannedStage(peer=PeerId(hop.peer), span=hop.span) for hop in present.hops),
        )

"""Finds the route for a request: the `Directory` protocol, and a directory of listed stages."""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from dsd_p2p.errors import ConfigError, PeerError
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.placement.listed import choose_listed_route
from dsd_p2p.placement.route import Detour
from dsd_p2p.session.request import Route
from dsd_p2p.types import PeerId, PeerInfo, Span
from dsd_p2p.wire.messages import Hop

logger = logging.getLogger(__name__)

NO_DETOUR = Detour()

_CONNECT_TIMEOUT_S = 20.0


OURSELVES = ""
"""The root of our own peer, whose word we need nobody to confirm."""


class Replica(NamedTuple):
    """A peer that can check another one. root: the invite that it came with."""

    peer: PeerId
    root: str


class Directory(Protocol):
    """A source of routes and replicas."""

    async def find(self, detour: Detour = NO_DETOUR) -> Route:
        """Return the best route that respects the detour; may wait for one, up to a deadline.

        Raises:
            ConfigError: the known stages do not form a route.
            PeerError: no route was found in time.
        """
        ...

    def replicas(self, span: Span, but: str) -> Sequence[Replica]:
        """Return the connected peers that hold a span, except the peer `but`."""
        ...

    def root_of(self, peer: str) -> str:
        """Return the invite that a peer came with, or `OURSELVES`."""
        ...


class StageList:
    """A directory of stages given by address, and of the stages that they know."""

    def __init__(self, links: PeerLinks) -> None:
        self._links = links
        self._dialed: dict[str, str] = {}

    async def add(self, addresses: Sequence[str]) -> None:
        """Connect to the peers at these addresses and to every stage that they know.

        Raises:
            PeerError: one of `addresses` cannot be reached.
            ConfigError: one of `addresses` cannot be parsed.
        """
        for address in addresses:
            info = await self._links.connect(address, _CONNECT_TIMEOUT_S)
            self._dialed[info.peer] = address
        await self._reconnect(_CONNECT_TIMEOUT_S)

    def stages(self, detour: Detour = NO_DETOUR) -> list[PeerInfo]:
        """Return the stages that the next request would use.

        Raises:
            ConfigError: the connected stages do not cover one model.
        """
        links, known = self._links, self._links.known.items()
        usable = [info for peer, info in known if peer in links.connected and peer not in detour.peers]
        # Either end of a broken link may be at fault. Do without the far end if possible; otherwise try it again.
        far = {peer for _, peer in detour.links}
        try:
            return choose_listed_route(info for info in usable if info.peer not in far)
        except ConfigError:
            return choose_listed_route(usable)

    async def find(self, detour: Detour = NO_DETOUR) -> Route:
        """Reconnect to lost stages and return the route with the fewest stages."""
        await self._reconnect(_CONNECT_TIMEOUT_S / 4)
        stages = self.stages(detour)
        model = stages[0].model
        assert model is not None, "a stage names its model"
        return Route(
            hops=tuple(
                Hop(peer=info.peer, address=self._address_of(info), span=info.span)
                for info in stages
                if info.span is not None
            ),
            model=model,
            max_positions=stages[0].max_positions,
        )

    def root_of(self, peer: str) -> str:
        """Return the peer itself: listed stages came without invites, and are believed to be of different people."""
        return OURSELVES if peer == self._links.me.peer else peer

    def replicas(self, span: Span, but: str) -> list[Replica]:
        """Return the connected stages that hold a span, except the peer `but`."""
        return [
            Replica(peer, self.root_of(peer))
            for peer, info in self._links.known.items()
            if peer in self._links.connected and peer != but and info.span is not None and info.span.holds(span)
        ]

    async def _reconnect(self, timeout_s: float) -> None:
        for info in list(self._links.known.values()):
            if info.span is not None and info.addresses and PeerId(info.peer) not in self._links.connected:
                try:
                    await self._links.connect(self._address_of(info), timeout_s)
                except (PeerError, ConfigError) as exc:
                    logger.warning("known peer not reachable peer=%s error=%s", info.peer, exc)

    def _address_of(self, info: PeerInfo) -> str:
        """Return the address that worked for us; the one that a peer advertises may be its loopback."""
        advertised = info.addresses[0] if info.addresses else ""
        return self._dialed.get(info.peer, advertised)

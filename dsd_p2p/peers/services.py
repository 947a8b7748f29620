"""The one receive loop of a process: each message goes to the service that takes its kind."""

import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.transport.base import Lost
from dsd_p2p.wire.messages import Failure, Message

logger = logging.getLogger(__name__)


class Service(Protocol):
    """Something a peer does for others: a stage, a coordinator, membership."""

    @property
    def takes(self) -> tuple[type[Message], ...]:
        """The messages it handles."""
        ...

    def start(self, nursery: trio.Nursery) -> None:
        """Get ready for messages; what it does beside them runs in `nursery`."""
        ...

    async def handle(self, event: Arrived) -> None:
        """Take a message in; soon done, because everybody waits for it.

        Raises:
            RemoteProtocolError: the sender broke the protocol and is dropped.
        """
        ...

    def lost(self, event: Lost) -> None:
        """The connection to a peer is gone."""
        ...


async def run_services(links: PeerLinks, services: Sequence[Service]) -> None:
    """Run the services and feed them until cancelled."""
    async with trio.open_nursery() as nursery:
        for service in services:
            service.start(nursery)
        while True:
            event = await links.receive()
            if isinstance(event, Lost):
                for service in services:
                    service.lost(event)
                continue
            try:
                await _hand(event, services)
            except RemoteProtocolError as exc:
                await links.refuse(event.sender, exc)


async def _hand(event: Arrived, services: Sequence[Service]) -> None:
    kind = type(event.message)
    takers = [service for service in services if kind in service.takes]
    if not takers and not isinstance(event.message, Failure):
        raise RemoteProtocolError("message", kind.__name__, "one that this peer takes")
    for service in takers:
        await service.handle(event)

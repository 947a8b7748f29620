"""The one receive loop of a process: each message goes to the service that takes its kind."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.transport.base import Lost
from dsd_p2p.wire.messages import Failure, Message

logger = logging.getLogger(__name__)


Handler = Callable[[Arrived, Any], Awaitable[None]]
"""Takes in a message and what arrived with it; soon done, because all others wait for it.

Raises:
    RemoteProtocolError: the sender broke the protocol and is dropped.
"""


class Service(Protocol):
    """Something a peer does for others: a stage, a coordinator, membership."""

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """What it does with each kind of message that it takes; asked once."""
        ...

    def start(self, nursery: trio.Nursery) -> None:
        """Get ready for messages; what it does beside them runs in `nursery`."""
        ...

    def lost(self, event: Lost) -> None:
        """The connection to a peer is gone."""
        ...


async def run_services(links: PeerLinks, services: Sequence[Service]) -> None:
    """Run the services and feed them until cancelled."""
    handlers: dict[type[Message], list[Handler]] = {}
    for service in services:
        for kind, handler in service.handlers.items():
            handlers.setdefault(kind, []).append(handler)
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
                await _hand(event, handlers)
            except RemoteProtocolError as exc:
                await links.refuse(event.sender, exc)


async def _hand(event: Arrived, handlers: Mapping[type[Message], Sequence[Handler]]) -> None:
    kind = type(event.message)
    takers = handlers.get(kind, ())
    # A failure may still be on its way to a coordinator that has gone.
    if not takers and not isinstance(event.message, Failure):
        raise RemoteProtocolError("message", kind.__name__, "one that this peer takes")
    for handler in takers:
        await handler(event, event.message)

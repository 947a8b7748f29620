"""Runs a process's only receive loop, which gives each message to the services that handle its kind."""

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
"""Handles what arrived and the message in it. It must return soon, because all other messages wait for it.

Raises:
    RemoteProtocolError: the sender broke the protocol; it is dropped.
"""


class Service(Protocol):
    """A part of a peer that handles messages: a stage, a coordinator, or membership."""

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler for each kind of message that the service takes; read once."""
        ...

    def start(self, nursery: trio.Nursery) -> None:
        """Get ready for messages, and start background tasks in `nursery`."""
        ...

    def lost(self, event: Lost) -> None:
        """Handle the loss of the connection to a peer."""
        ...


async def run_services(links: PeerLinks, services: Sequence[Service]) -> None:
    """Run the services and give them their messages until cancelled."""
    handlers: dict[type[Message], list[Handler]] = {}
    for service in services:
        for kind, handler in service.handlers.items():
            handlers.setdefault(kind, []).append(handler)
    async with trio.open_nursery() as nursery:
        links.start(nursery)
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
    # A failure may arrive after its coordinator has gone.
    if not takers and not isinstance(event.message, Failure):
        raise RemoteProtocolError("message", kind.__name__, "a kind that this peer handles")
    for handler in takers:
        await handler(event, event.message)

"""The seam between the protocol and the network. Every implementation passes `tests/transport/test_transport.py`."""

from dataclasses import dataclass
from typing import Protocol

from dsd_p2p.types import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A whole frame from an authenticated peer; frames of one peer arrive in the order they were sent."""

    sender: PeerId
    frame: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The connection to this peer is gone; what was on its way in either direction may be lost."""

    peer: PeerId
    reason: str


class Transport(Protocol):
    """Sends frames to peers and receives theirs. Opened and closed by the `async with` of its module."""

    @property
    def peer(self) -> PeerId:
        """This end's own identity."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can reach this end; empty when it does not listen."""
        ...

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        """Return the peer at `address`, connected; tries again with backoff until `timeout_s` have passed.

        Raises:
            PeerTimeout: nobody answered in time.
            PeerDisconnected: somebody refused for a reason that waiting does not mend.
            ConfigError: the address cannot be read.
        """
        ...

    async def send(self, to: PeerId, frame: bytes) -> None:
        """Queue `frame` for a connected peer or for ourselves; waits while the peer's bounded queue is full.

        A cancelled send queues the whole frame or nothing.

        Raises:
            PeerDisconnected: there is no connection to this peer.
            PeerTimeout: the queue stayed full: the peer takes nothing in.
        """
        ...

    def admit(self, peer: PeerId) -> None:
        """The peer has shown that it belongs here: until then it may send small frames of our own protocol only."""
        ...

    async def receive(self) -> Received | Lost:
        """Return the next event of any peer."""
        ...

    def penalise(self, peer: PeerId) -> None:
        """A frame of the peer was of no use: the pace at which it is read falls, until it sends better ones."""
        ...

    async def disconnect(self, peer: PeerId, reason: str, penalty_s: float = 0.0) -> None:
        """Drop the connection to `peer`; it and this end see `Lost`. Should it come back, it is not read for `penalty_s`."""
        ...

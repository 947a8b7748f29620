"""The interface between protocol and network. Every implementation passes `tests/transport/test_transport.py`."""

from dataclasses import dataclass
from typing import Protocol

from dsd_p2p.types import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A whole frame from an authenticated peer. Frames of one peer arrive in the order they were sent."""

    sender: PeerId
    frame: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The loss of the connection to a peer; frames under way in either direction may be lost."""

    peer: PeerId
    reason: str


class Transport(Protocol):
    """A connection to the network that sends and receives frames. Its module's `async with` opens and closes it."""

    @property
    def peer(self) -> PeerId:
        """This end's own identity."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses at which others can reach this end; empty if it does not listen."""
        ...

    def sign(self, data: bytes) -> bytes:
        """Return the signature of this end's identity."""
        ...

    def is_signed(self, peer: PeerId, signature: bytes, data: bytes) -> bool:
        """Return whether the identity of `peer` made the signature. It need not be connected."""
        ...

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        """Connect to `address` and return its peer; retry with backoff until `timeout_s` have passed.

        Raises:
            PeerTimeout: nobody answered in time.
            PeerDisconnected: the peer refused for a reason that waiting does not change.
            ConfigError: the address cannot be parsed.
        """
        ...

    async def send(self, to: PeerId, frame: bytes) -> None:
        """Queue `frame` for a connected peer or for ourselves; wait while the peer's bounded queue is full.

        A cancelled send queues the whole frame or nothing.

        Raises:
            PeerDisconnected: there is no connection to this peer, or the loss of an earlier one was not received yet.
            PeerTimeout: the queue stayed full because the peer reads nothing.
        """
        ...

    def admit(self, peer: PeerId) -> None:
        """Lift the limits on a peer that has shown that it belongs here.

        Until then it may send only small frames, and only on our own protocol.
        """
        ...

    async def receive(self) -> Received | Lost:
        """Return the next event from any peer."""
        ...

    def change_network_key(self, key: bytes) -> None:
        """Use another key of the private network for all connections to come. Those that are open stay."""
        ...

    def penalise(self, peer: PeerId) -> None:
        """Count a useless frame against the peer: it is read more slowly until it sends better ones."""
        ...

    async def disconnect(self, peer: PeerId, reason: str, penalty_s: float = 0.0) -> None:
        """Drop the connection to `peer`; both ends see `Lost`. If it comes back, it is not read for `penalty_s`."""
        ...

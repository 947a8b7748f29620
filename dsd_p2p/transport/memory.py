"""A transport between peers in one process, for tests and experiments; `emulated` adds link delays."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from dsd_p2p.errors import PeerDisconnected, PeerTimeout
from dsd_p2p.transport.base import Lost, Received
from dsd_p2p.types import PeerId

_SCHEME = "memory:"
_INBOX_FRAMES = 4096


class MemoryNetwork:
    """A set of named peers that can reach each other."""

    def __init__(self) -> None:
        self.transports: dict[str, MemoryTransport] = {}
        self._joined: dict[str, trio.Event] = {}

    async def joined(self, name: str) -> None:
        """Wait until a peer has joined under that name."""
        await self._joined.setdefault(name, trio.Event()).wait()

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator["MemoryTransport"]:
        """Join as `name`; leaving drops all connections."""
        transport = MemoryTransport(self, name)
        self.transports[name] = transport
        self._joined.setdefault(name, trio.Event()).set()
        try:
            yield transport
        finally:
            del self.transports[name], self._joined[name]
            with trio.CancelScope(shield=True):
                for peer in list(transport.connected):
                    await transport.disconnect(peer, f"{name} left")


class MemoryTransport:
    """One peer of a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self._network = network
        self.peer = PeerId(name)
        self.addresses = (_SCHEME + name,)
        self.connected: set[PeerId] = set()
        self._deliver, self._inbox = trio.open_memory_channel[Received | Lost](_INBOX_FRAMES)

    def sign(self, data: bytes) -> bytes:
        """Return a hash of the name and the data. In memory, nobody forges it but a test."""
        return _signature(self.peer, data)

    def is_signed(self, peer: PeerId, signature: bytes, data: bytes) -> bool:
        """Return whether the signature is that of `peer`."""
        return signature == _signature(peer, data)

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        """Connect in both directions; wait for a peer that has not joined yet."""
        name = address.removeprefix(_SCHEME)
        with trio.move_on_after(timeout_s):
            await self._network.joined(name)
        other = self._network.transports.get(name)
        if other is None:
            raise PeerTimeout(f"no peer at {address} within {timeout_s:g} s: start that peer first")
        self.connected.add(other.peer)
        other.connected.add(self.peer)
        await trio.lowlevel.checkpoint()
        return other.peer

    async def send(self, to: PeerId, frame: bytes) -> None:
        """Hand the frame to the other end's inbox."""
        other = self._network.transports.get(to)
        if other is None or (to not in self.connected and to != self.peer):
            raise PeerDisconnected(f"not connected to {to}")
        await other._deliver.send(Received(sender=self.peer, frame=frame))

    def admit(self, peer: PeerId) -> None:
        """Do nothing: in memory every peer has full access."""

    async def receive(self) -> Received | Lost:
        """Return the next event."""
        return await self._inbox.receive()

    def change_network_key(self, key: bytes) -> None:
        """Do nothing: in memory there is no private network."""

    def penalise(self, peer: PeerId) -> None:
        """Do nothing: in memory no peer is paced."""

    async def disconnect(self, peer: PeerId, reason: str, penalty_s: float = 0.0) -> None:
        """Drop the connection at both ends."""
        await trio.lowlevel.checkpoint()
        if peer not in self.connected:
            return
        self.connected.discard(peer)
        self._deliver.send_nowait(Lost(peer=peer, reason=reason))
        other = self._network.transports.get(peer)
        if other is not None and self.peer in other.connected:
            other.connected.discard(self.peer)
            other._deliver.send_nowait(Lost(peer=self.peer, reason=reason))


def _signature(peer: PeerId, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=hashlib.sha256(peer.encode()).digest()).digest()

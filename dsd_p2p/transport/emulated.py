"""Adds a link's latency, jitter and bandwidth to any transport, so that one machine behaves like a wide-area network.

Only frames are delayed; connecting to a peer and losing one are not.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from dsd_p2p.errors import PeerDisconnected, PeerTimeout
from dsd_p2p.netmodel import LinkModel, LinkState
from dsd_p2p.transport.base import Lost, Received, Transport
from dsd_p2p.types import PeerId, UniformRng

_QUEUE_FRAMES = 1024
_SEND_TIMEOUT_S = 30.0


class EmulatedTransport:
    """A transport that sends through `inner` as if over `link`. Wrap both ends for a symmetric link."""

    def __init__(self, inner: Transport, link: LinkModel, rng: UniformRng, nursery: trio.Nursery) -> None:
        self._inner = inner
        self._link = link
        self._rng = rng
        self._nursery = nursery
        self._links: dict[PeerId, tuple[LinkState, trio.MemorySendChannel[tuple[float, bytes]]]] = {}

    @property
    def peer(self) -> PeerId:
        """The inner transport's identity."""
        return self._inner.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """The inner transport's addresses."""
        return self._inner.addresses

    def sign(self, data: bytes) -> bytes:
        """Sign with the inner transport's identity."""
        return self._inner.sign(data)

    def is_signed(self, peer: PeerId, signature: bytes, data: bytes) -> bool:
        """Ask the inner transport."""
        return self._inner.is_signed(peer, signature, data)

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        """Connect without delay."""
        return await self._inner.connect(address, timeout_s)

    async def send(self, to: PeerId, frame: bytes) -> None:
        """Put the frame on the emulated link; frames to ourselves skip it."""
        if to == self.peer:
            await self._inner.send(to, frame)
            return
        if to not in self._links:
            queue, waiting = trio.open_memory_channel[tuple[float, bytes]](_QUEUE_FRAMES)
            self._links[to] = (LinkState(self._link), queue)
            self._nursery.start_soon(self._carry, to, waiting)
        state, queue = self._links[to]
        due_s = state.send(now_s=trio.current_time(), num_bytes=len(frame), rng=self._rng)
        try:
            with trio.fail_after(_SEND_TIMEOUT_S):
                await queue.send((due_s, frame))
        except trio.TooSlowError:
            raise PeerTimeout(f"the emulated link to {to} is full: {_QUEUE_FRAMES} frames are waiting") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # If the peer comes back, it gets a new link.
            if to in self._links and self._links[to][1] is queue:
                del self._links[to]
            raise PeerDisconnected(f"the connection to {to} is gone") from None

    def admit(self, peer: PeerId) -> None:
        """Admit the peer to the inner transport."""
        self._inner.admit(peer)

    async def receive(self) -> Received | Lost:
        """Return the next event; drop the frames that still wait on the link to a lost peer."""
        event = await self._inner.receive()
        if isinstance(event, Lost) and (link := self._links.pop(event.peer, None)) is not None:
            link[1].close()
        return event

    def change_network_key(self, key: bytes) -> None:
        """Change it in the inner transport."""
        self._inner.change_network_key(key)

    def penalise(self, peer: PeerId) -> None:
        """Penalise the peer in the inner transport."""
        self._inner.penalise(peer)

    async def disconnect(self, peer: PeerId, reason: str, penalty_s: float = 0.0) -> None:
        """Drop the connection at once."""
        await self._inner.disconnect(peer, reason, penalty_s)

    async def _carry(self, to: PeerId, waiting: trio.MemoryReceiveChannel[tuple[float, bytes]]) -> None:
        async with waiting:
            async for due_s, frame in waiting:
                await trio.sleep_until(due_s)
                try:
                    await self._inner.send(to, frame)
                except (PeerDisconnected, PeerTimeout):
                    return


@asynccontextmanager
async def emulate(inner: Transport, link: LinkModel, rng: UniformRng) -> AsyncIterator[Transport]:
    """Wrap `inner`, or yield it unchanged if the link is ideal."""
    if link.is_ideal:
        yield inner
        return
    async with trio.open_nursery() as nursery:
        yield EmulatedTransport(inner, link, rng, nursery)
        nursery.cancel_scope.cancel()

"""The libp2p transport: TCP, Noise and Yamux, with one long-lived stream per neighbour and direction.

docs/adr/0002-libp2p.md lists what py-libp2p 0.8.1 needs from its caller; each workaround below has a regression test.
"""

import logging
import struct
from contextlib import suppress
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import InvalidAddrError, info_from_p2p_addr
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from dsd_p2p.errors import ConfigError, PeerDisconnected, PeerTimeout, RemoteProtocolError
from dsd_p2p.keys import is_signed_by, public_of
from dsd_p2p.transport.base import Lost, Received
from dsd_p2p.transport.libp2p import relay
from dsd_p2p.transport.libp2p.guard import (
    WRONG_NETWORK_KEY,
    Pace,
)
from dsd_p2p.transport.libp2p.sockets import is_lossy, raw_socket, set_congestion_control
from dsd_p2p.transport.libp2p.streams import NETWORK_ERRORS, Link, StreamBuffer, check_open, reset
from dsd_p2p.types import PeerId

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
_INBOX_EVENTS = 4096
_MAX_PENDING_BYTES = 256 << 20
"""Limit on one peer's frames that are read but not yet taken by `receive`; beyond it the peer is dropped."""

_MAX_STRANGER_FRAME_BYTES = 64 << 10
"""Frame limit before admission: enough for a greeting."""

_FRAMES_PER_S, _BURST_FRAMES = 200.0, 1000
"""Per peer: a window every five milliseconds, and a long prompt as one burst. A faster sender delays only itself."""

_USELESS_FRAME_COUNTS = 5
"""A useless frame counts as this many. A request's end leaves a few, so only peers that send little else slow down."""

_MAX_PACES = 1024
_FLUSH_S = 0.5
_SEND_TIMEOUT_S = 30.0
_DIAL_TIMEOUT_S = 5.0

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 2.0

_TUNE_INTERVAL_S = 2.0


class Libp2pTransport:
    """A `Transport` over a libp2p host; `.open.open_libp2p` makes it."""

    def __init__(self, host: Any, protocol: str, max_frame_bytes: int, nursery: trio.Nursery) -> None:
        self._host = host
        self._protocol = protocol
        self._max_frame_bytes = max_frame_bytes
        self._nursery = nursery
        self._links: dict[PeerId, Link] = {}
        self._inbound: dict[PeerId, Any] = {}
        self._pending_bytes: dict[PeerId, int] = {}
        self._deliver, self._inbox = trio.open_memory_channel[Received | Lost](_INBOX_EVENTS)
        self._is_closing = False
        # Peers whose loss nobody has read yet. A frame for one of them would be the first of a new connection.
        self._unreported: set[PeerId] = set()
        self._admitted: set[PeerId] = set()
        self._paces: dict[PeerId, Pace] = {}
        self.peer = PeerId(str(host.get_id()))
        self.addresses: tuple[str, ...] = ()

    def close(self) -> None:
        """Stop reporting losses, because this end is leaving."""
        self._is_closing = True

    def sign(self, data: bytes) -> bytes:
        """Sign with the host's private key."""
        signature: bytes = self._host.get_private_key().sign(data)
        return signature

    def is_signed(self, peer: PeerId, signature: bytes, data: bytes) -> bool:
        """Check the signature with the public key in the peer's id."""
        try:
            return is_signed_by(public_of(peer), signature, data)
        except RemoteProtocolError:
            return False

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        """Dial until it works or the time is up."""
        try:
            info = info_from_p2p_addr(Multiaddr(address))
        except (MultiaddrError, InvalidAddrError, ValueError) as exc:
            raise ConfigError(
                f"address {address!r}: {exc}; write it as /ip4/HOST/tcp/PORT/p2p/PEER, or with ip6 or dns"
            ) from exc
        peer = PeerId(str(info.peer_id))
        backoff_s = _FIRST_BACKOFF_S
        last_error: Exception | None = None
        with trio.move_on_after(timeout_s):
            while True:
                try:
                    with trio.fail_after(_DIAL_TIMEOUT_S):
                        # libp2p blocks a peer for a minute after a failed dial; this loop does its own retries.
                        self._host.get_network().unblock_peer(info.peer_id)
                        await self._dial(info, address)
                        link = self._link_to(peer, is_attempt=True)
                        await link.is_settled.wait()
                        check_open(link)
                except Exception as exc:  # whatever a hostile answer makes libp2p raise is one failed attempt
                    last_error = exc
                    if "handshake" in str(exc.__cause__ or exc):
                        raise PeerDisconnected(f"{address} has another peer id: check the part after /p2p/") from exc
                    if WRONG_NETWORK_KEY in str(_root(exc)):
                        raise PeerDisconnected(f"{address} is {WRONG_NETWORK_KEY}: check the invite") from exc
                    await trio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                else:
                    return peer
        raise PeerTimeout(
            f"no connection to {address} within {timeout_s:g} s: is that peer running and reachable?"
        ) from last_error

    async def _dial(self, info: Any, address: str) -> None:
        if relay.CIRCUIT in address:
            await relay.dial_relayed(self._host, address)
        else:
            await self._host.connect(info)

    def is_relayed(self, peer: PeerId) -> bool:
        """True when all connections to the peer go through a relay."""
        connections = self._host.get_network().get_connections(ID.from_string(peer))
        return bool(connections) and all(relay.is_relayed(connection) for connection in connections)

    def be_reachable_through(self, address: str) -> None:
        """Hold a reservation at the relay at `address` and advertise the address through it."""
        self.addresses = (*self.addresses, f"{address}{relay.CIRCUIT}/p2p/{self.peer}")
        self._nursery.start_soon(relay.keep_reserved, self._host, address)

    async def send(self, to: PeerId, frame: bytes) -> None:
        """Queue the frame for the peer's writer."""
        if to == self.peer:
            self._pending_bytes[to] = self._pending_bytes.get(to, 0) + len(frame)
            await self._deliver.send(Received(sender=to, frame=frame))
            return
        link = self._links.get(to)
        if (link is None and to not in self._inbound) or to in self._unreported:
            raise PeerDisconnected(f"not connected to {to}")
        try:
            with trio.fail_after(_SEND_TIMEOUT_S):
                await (link or self._link_to(to)).queue.send(frame)
        except trio.TooSlowError:
            raise PeerTimeout(f"{to} reads no frames: it is stuck or the link is down") from None
        except (*NETWORK_ERRORS, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise PeerDisconnected(f"the connection to {to} is gone") from exc

    def admit(self, peer: PeerId) -> None:
        """Open all protocols and full-size frames to the peer."""
        self._admitted.add(peer)

    def is_admitted(self, peer: PeerId) -> bool:
        """True once `admit` was called for this connection of the peer."""
        return peer in self._admitted

    async def receive(self) -> Received | Lost:
        """Return the next event."""
        event = await self._inbox.receive()
        if isinstance(event, Received):
            self._pending_bytes[event.sender] -= len(event.frame)
        else:
            self._unreported.discard(event.peer)
        return event

    def change_network_key(self, key: bytes) -> None:
        """Use another key of the private network for all connections to come."""
        self._host.get_network().psk = key.hex()

    def penalise(self, peer: PeerId) -> None:
        """Count the peer's last frame as several."""
        for _ in range(_USELESS_FRAME_COUNTS - 1):
            self._pace_of(peer).delay_s(trio.current_time())

    async def disconnect(self, peer: PeerId, reason: str, penalty_s: float = 0.0) -> None:
        """Drop the connection; both ends see `Lost`. Frames sent before get half a second to go out."""
        link = self._links.get(peer)
        connections = list(self._host.get_network().get_connections(ID.from_string(peer)))
        self._drop(peer, reason, is_flushing=True)
        self._pace_of(peer).charge(penalty_s, trio.current_time())
        self._nursery.start_soon(self._close, link, connections)
        await trio.lowlevel.checkpoint()

    async def _close(self, link: Link | None, connections: list[Any]) -> None:
        if link is not None:
            with trio.move_on_after(_FLUSH_S):
                await link.is_over.wait()
        for connection in connections:
            with trio.move_on_after(1), suppress(Exception):
                await connection.close()

    def _pace_of(self, peer: PeerId) -> Pace:
        while peer not in self._paces and len(self._paces) >= _MAX_PACES:
            del self._paces[next(iter(self._paces))]
        return self._paces.setdefault(peer, Pace(_FRAMES_PER_S, _BURST_FRAMES))

    def _link_to(self, peer: PeerId, *, is_attempt: bool = False) -> Link:
        """Return the outgoing link to a connected peer; the first use opens its stream in the background."""
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(is_attempt=is_attempt)
            self._nursery.start_soon(self._run_link, peer, link)
        return link

    async def _run_link(self, peer: PeerId, link: Link) -> None:
        reason = "closed by the peer"
        try:
            with trio.fail_after(_DIAL_TIMEOUT_S):
                link.stream = await self._host.new_stream(ID.from_string(peer), [self._protocol])
            link.is_settled.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, link.stream, nursery.cancel_scope)
                await self._write(link)
                nursery.cancel_scope.cancel()
        except Exception as exc:  # task boundary: negotiation raises whatever the peer's bytes provoke
            reason = f"stream failed: {type(exc).__name__}"
            logger.debug("stream failed peer=%s error=%r", peer, exc)
        finally:
            link.is_settled.set()
            self._drop(peer, reason, link)
            if link.stream is not None:
                await reset(link.stream)
            link.is_over.set()

    async def _write(self, link: Link) -> None:
        """Write the link's frames to its stream: one writer per stream, one write per frame."""
        raw = None if relay.is_relayed(link.stream.muxed_conn) else raw_socket(link.stream)
        set_congestion_control(raw, b"cubic")
        tuned_at_s = trio.current_time()
        async with link.waiting:
            async for frame in link.waiting:
                await link.stream.write(_LENGTH.pack(len(frame)) + frame)
                if trio.current_time() - tuned_at_s > _TUNE_INTERVAL_S:
                    tuned_at_s = trio.current_time()
                    if is_lossy(raw):
                        set_congestion_control(raw, b"bbr")

    async def _watch(self, stream: Any, scope: trio.CancelScope) -> None:
        """Cancel `scope` when the peer is gone: a read on our stream returns only then, and a write does not notice."""
        with suppress(*NETWORK_ERRORS):
            await stream.read(1)
        scope.cancel()

    async def read(self, stream: Any) -> None:
        """Drain an inbound stream at the peer's pace, so that a slow consumer never stalls the peer's other streams."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        replaced = self._inbound.get(peer)
        self._inbound[peer] = stream
        if replaced is not None:
            # One stream per direction: an old one that ends later must not close the new one.
            await reset(replaced)
        reason = "closed by the peer"
        buffer = StreamBuffer(stream)
        pace = self._pace_of(peer)
        try:
            while True:
                if (delay_s := pace.delay_s(trio.current_time())) > 0:
                    await trio.sleep(delay_s)
                (frame_bytes,) = _LENGTH.unpack(await buffer.take(_LENGTH.size))
                max_bytes = self._max_frame_bytes if peer in self._admitted else _MAX_STRANGER_FRAME_BYTES
                if frame_bytes > max_bytes:
                    reason = f"announced a frame of {frame_bytes} bytes; the limit is {max_bytes}"
                    return
                frame = await buffer.take(frame_bytes)
                if self._inbound.get(peer) is not stream:
                    continue
                pending_bytes = self._pending_bytes.get(peer, 0) + len(frame)
                if pending_bytes > _MAX_PENDING_BYTES:
                    reason = f"sent frames faster than we handle them: {pending_bytes} bytes are waiting"
                    return
                self._pending_bytes[peer] = pending_bytes
                await self._deliver.send(Received(sender=peer, frame=frame))
        except NETWORK_ERRORS as exc:
            logger.debug("stream ended peer=%s reason=%r", peer, exc)
        finally:
            if self._inbound.get(peer) is stream:
                self._drop(peer, reason)
            else:
                await reset(stream)

    def _drop(self, peer: PeerId, reason: str, link: Link | None = None, *, is_flushing: bool = False) -> None:
        """Forget both directions (if `link` is given, only while it is current) and report the loss once.

        is_flushing: keep the connection until queued frames are sent, and discard incoming ones. Resetting the streams
        now would tell the peer that we are gone before it can read why.
        """
        current, inbound = self._links.get(peer), self._inbound.get(peer)
        if self._is_closing or (link is not None and current is not link) or (current is None and inbound is None):
            return
        if current is not None:
            del self._links[peer]
            current.queue.close()
        self._inbound.pop(peer, None)
        self._admitted.discard(peer)
        for stream in () if is_flushing else (inbound, current and current.stream):
            if stream is not None:
                self._nursery.start_soon(reset, stream)
        if inbound is None and current is not None and current.is_attempt and current.stream is None:
            # A failed attempt of `connect`, which will retry: there was no connection to lose.
            return
        try:
            self._deliver.send_nowait(Lost(peer=peer, reason=reason))
            self._unreported.add(peer)
        except trio.WouldBlock:
            logger.exception("inbox full, loss not reported peer=%s", peer)


def _root(error: BaseException) -> BaseException:
    """Return the root cause of libp2p's error about a dial."""
    while (cause := error.__cause__ or next(iter(getattr(error, "errors", ())), None)) is not None:
        error = cause
    return error

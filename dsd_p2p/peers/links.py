"""Sends and receives messages: greets each peer once, answers pings, and drops peers that break the protocol."""

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from dsd_p2p.errors import PeerDisconnected, PeerError, PeerTimeout, RemoteProtocolError
from dsd_p2p.peers.aside import Aside
from dsd_p2p.peers.offences import Offences
from dsd_p2p.peers.pings import Pings
from dsd_p2p.transport.base import Lost, Transport
from dsd_p2p.types import PeerId, PeerInfo
from dsd_p2p.wire.codec import decode, encode
from dsd_p2p.wire.membership import Grant
from dsd_p2p.wire.messages import MAX_KNOWN_PEERS, Failure, FailureKind, Hello, Message, Ping, Pong
from dsd_p2p.wire.version import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

_REPLY_TIMEOUT_S = 0.5
_NOT_LET_IN_S = 2.0
"""How long a peer is not read that was not let in. That is no offence: its invite may just have expired."""

NO_SESSION = bytes(8)
"""The session id in a `Failure` that concerns the whole connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A checked message; `payload` is a view into the frame."""

    sender: PeerId
    message: Message
    payload: memoryview
    num_bytes: int


class Gatekeeper(Protocol):
    """Decides whether a peer is let in; asked at its greeting, before anything is allocated for it."""

    @property
    def grants(self) -> tuple[Grant, ...]:
        """The grants that we show to be let in elsewhere."""
        ...

    def admit(self, peer: PeerId, hello: Hello) -> None:
        """Let the peer in.

        Raises:
            RemoteProtocolError: the peer does not belong here; says why.
        """
        ...

    def root_of(self, peer: PeerId) -> str:
        """Return the invite that a peer came with, or the peer itself."""
        ...


class OpenGate:
    """A gatekeeper that lets every peer in, for stages that are started by hand or by a test."""

    grants: tuple[Grant, ...] = ()

    def admit(self, peer: PeerId, hello: Hello) -> None:
        """Let the peer in."""

    def root_of(self, peer: PeerId) -> str:
        """Return the peer itself."""
        return peer


class PeerLinks:
    """A peer's connections to other peers, for stages and coordinators alike. One task must keep calling `receive`.

    gatekeeper: decides who is let in; without one, everybody is.
    """

    def __init__(self, transport: Transport, me: PeerInfo, gatekeeper: Gatekeeper | None = None) -> None:
        self.transport = transport
        self.me = me
        self._gatekeeper: Gatekeeper = gatekeeper or OpenGate()
        self.known: dict[PeerId, PeerInfo] = {}
        self.connected: set[PeerId] = set()
        self.bytes_sent: Counter[str] = Counter()
        self.bytes_received: Counter[str] = Counter()
        self._greeted: set[PeerId] = set()
        self._hello_from: dict[PeerId, trio.Event] = {}
        self._refusals: dict[PeerId, tuple[float, str]] = {}
        self._pings = Pings()
        self._aside = Aside()
        self._offences = Offences()
        self.num_refused = 0
        self.num_frames = 0

    def start(self, nursery: trio.Nursery) -> None:
        """Answer pings and refuse peers in `nursery`, so that a peer that reads nothing holds up nobody."""
        self._aside.start(nursery)

    async def connect(self, address: str, timeout_s: float) -> PeerInfo:
        """Connect to the peer at `address` and return what it says about itself.

        Raises:
            PeerTimeout: the peer cannot be reached or does not speak this protocol.
            PeerDisconnected: the peer refused us or closed the connection.
            ConfigError: the address cannot be parsed.
        """
        start_s = trio.current_time()
        with trio.move_on_after(timeout_s) as scope:
            peer = await self.transport.connect(address, timeout_s)
            await self.greet(peer)
            await self._hello_from.setdefault(peer, trio.Event()).wait()
        if scope.cancelled_caught:
            raise PeerTimeout(f"{address} does not answer: is it a dsd node of protocol version {PROTOCOL_VERSION}?")
        refused_at_s, refusal = self._refusals.get(peer, (-math.inf, ""))
        if refused_at_s >= start_s and peer not in self.connected:
            raise PeerDisconnected(f"{address} refused us: {refusal}")
        if peer not in self.connected:
            raise PeerDisconnected(f"{address} closed the connection")
        return self.known[peer]

    def root_of(self, peer: PeerId) -> str:
        """Return the invite that a peer came with, or the peer itself."""
        return self._gatekeeper.root_of(peer)

    def is_connected(self, peer: str) -> bool:
        """True if messages can be sent to `peer`; we are always connected to ourselves."""
        return peer in self.connected or peer == self.transport.peer

    async def greet(self, peer: PeerId) -> None:
        """Send a hello to the peer, once per connection."""
        if peer in self._greeted:
            return
        self._greeted.add(peer)
        known = tuple(info for name, info in self.known.items() if name != peer and info.span is not None)[
            :MAX_KNOWN_PEERS
        ]
        try:
            await self.send(
                peer, Hello(version=PROTOCOL_VERSION, sender=self.me, known=known, grants=self._gatekeeper.grants)
            )
        except BaseException:  # cancelled, too: the peer is not greeted
            self._greeted.discard(peer)
            raise

    async def introduce(self) -> None:
        """Greet every connected peer again, with all the stages that we know by now."""
        for peer in list(self.connected):
            self._greeted.discard(peer)
            await self.greet(peer)

    async def send(self, to: PeerId, message: Message, payload: bytes | memoryview = b"") -> None:
        """Send one message.

        Raises:
            PeerDisconnected, PeerTimeout: see `Transport.send`.
        """
        frame = encode(message, payload)
        self.bytes_sent[type(message).__name__] += len(frame)
        await self.transport.send(to, frame)

    async def round_trip_s(self, peer: PeerId, timeout_s: float, num_bytes: int = 0) -> float:
        """Return the seconds from sending a ping to receiving its small answer, on the stream that windows use.

        num_bytes: padding of the ping, at most `MAX_PING_BYTES`.

        Raises:
            PeerTimeout, PeerDisconnected: there was no answer.
        """
        start_s = trio.current_time()
        with self._pings.ping() as (nonce, answered):
            try:
                with trio.fail_after(timeout_s):
                    await self.send(peer, Ping(nonce=nonce, padding=bytes(num_bytes)))
                    await answered.wait()
            except trio.TooSlowError:
                raise PeerTimeout(f"{peer} did not answer a ping within {timeout_s:g} s") from None
        return trio.current_time() - start_s

    async def receive(self) -> Arrived | Lost:
        """Return the next message that the links do not handle themselves, or the loss of a peer."""
        while True:
            event = await self.transport.receive()
            if isinstance(event, Lost):
                self._forget(event.peer)
                return event
            if self._aside.is_leaving(event.sender):
                continue
            self.num_frames += 1
            try:
                message, payload = decode(event.frame)
                self.bytes_received[type(message).__name__] += len(event.frame)
                if await self._is_handled(event.sender, message):
                    continue
                self._check_greeted(event.sender, message)
            except RemoteProtocolError as exc:
                await self.refuse(event.sender, exc)
                continue
            return Arrived(sender=event.sender, message=message, payload=payload, num_bytes=len(event.frame))

    async def refuse(self, peer: PeerId, error: RemoteProtocolError) -> None:
        """Tell the peer what it did wrong and drop it. Nothing more is heard of it until it comes back."""
        logger.warning("peer dropped peer=%s error=%s", peer, error)
        self.num_refused += 1
        await self._aside.dismiss(peer, partial(self._dismiss, peer, error))

    async def _dismiss(self, peer: PeerId, error: RemoteProtocolError) -> None:
        with suppress(PeerError), trio.move_on_after(1):
            await self.send(
                peer, Failure(session=NO_SESSION, epoch=0, kind=FailureKind.PROTOCOL, text=str(error)[:512])
            )
        now_s, left_s = trio.current_time(), _NOT_LET_IN_S
        if peer in self.connected:
            left_s = self._offences.ban_left_s(peer, now_s) or self._offences.note(peer, now_s)
        await self.transport.disconnect(peer, str(error), left_s)

    async def _is_handled(self, sender: PeerId, message: Message) -> bool:
        match message:
            case Hello():
                self._meet(sender, message)
                # Not in the background: it must be the first that the peer hears of us.
                await self._reply(sender, partial(self.greet, sender))
            case Ping(nonce=nonce) if sender in self.connected:
                pong = partial(self.send, sender, Pong(nonce=nonce))
                await self._aside.answer(sender, partial(self._reply, sender, pong))
            case Pong(nonce=nonce):
                self._pings.answered(nonce)
            case Failure(session=session, text=text) if session == NO_SESSION:
                logger.warning("peer refused us peer=%s text=%s", sender, text)
                while len(self._refusals) >= MAX_KNOWN_PEERS:
                    del self._refusals[next(iter(self._refusals))]
                self._refusals[sender] = (trio.current_time(), text)
                self._hello_from.setdefault(sender, trio.Event()).set()
            case _:
                return False
        return True

    async def _reply(self, peer: PeerId, send: Callable[[], Awaitable[None]]) -> None:
        """Send an answer; drop a peer that does not read it."""
        with trio.move_on_after(_REPLY_TIMEOUT_S) as scope, suppress(PeerError):
            await send()
        if scope.cancelled_caught:
            await self.transport.disconnect(peer, "does not read our answers")

    def _meet(self, sender: PeerId, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise RemoteProtocolError("protocol version", hello.version, str(PROTOCOL_VERSION))
        if hello.sender.peer != sender:
            raise RemoteProtocolError("sender", hello.sender.peer, f"{sender}, the peer of the connection")
        if (left_s := self._offences.ban_left_s(sender, trio.current_time())) > 0:
            raise RemoteProtocolError(
                "peer", "one that broke the protocol again and again", f"it again in {left_s:.0f} s"
            )
        self._gatekeeper.admit(sender, hello)
        self.transport.admit(sender)
        for info in hello.known:
            # What others say about a peer counts until it greets us itself. Only stages are worth remembering.
            is_news = info.peer != self.transport.peer and info.peer not in self.known and info.span is not None
            if is_news and len(self.known) < MAX_KNOWN_PEERS:
                self.known[PeerId(info.peer)] = info
        self.known[sender] = hello.sender
        self.connected.add(sender)
        self._hello_from.setdefault(sender, trio.Event()).set()

    def _check_greeted(self, sender: PeerId, message: Message) -> None:
        if not self.is_connected(sender):
            raise RemoteProtocolError("first message", type(message).__name__, "Hello")

    def _forget(self, peer: PeerId) -> None:
        self.connected.discard(peer)
        self._greeted.discard(peer)
        self._aside.forget(peer)
        if (info := self.known.get(peer)) is not None and info.span is None:
            del self.known[peer]
        if (waiting := self._hello_from.pop(peer, None)) is not None:
            waiting.set()

"""What an attack knows of its target, and the hostile peer that carries it out."""

import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from dsd_p2p.errors import DsdError, PeerError, RemoteProtocolError
from dsd_p2p.keys import SigningKey
from dsd_p2p.swarm.invite import Invite, InviteTerms, SwarmSettings, new_invite
from dsd_p2p.transport.base import Lost
from dsd_p2p.transport.libp2p import Libp2pTransport, open_libp2p
from dsd_p2p.types import Endpoint, ModelKey, PeerId, PeerInfo, Span, TextRequest
from dsd_p2p.wire.codec import MAX_FRAME_BYTES, decode, encode
from dsd_p2p.wire.membership import Grant, Heard, Heartbeat, Members, Role
from dsd_p2p.wire.messages import Failure, FailureKind, Hello, Hop, Message, OpenSession, Ping, Pong, Window
from dsd_p2p.wire.opening import signed_opening
from dsd_p2p.wire.version import PROTOCOL_ID, PROTOCOL_VERSION
from node.member.state import SwarmState

_HOUR_S = 3600


class NotHeld(Exception):  # noqa: N818 - reads as what it reports
    """An attack succeeded; says how."""


class Ground(msgspec.Struct, kw_only=True):
    """The target. owner: the folder of the swarm's owner, whose invites attackers use. api: the gateway, with a key.

    stages: the id, address and layers of each peer of the swarm, the target first.
    """

    address: str
    owner: str
    api: str
    api_key: str
    model: ModelKey
    max_positions: int
    stages: list[tuple[str, str, Span]]

    @property
    def peer(self) -> PeerId:
        """The target's id."""
        return PeerId(self.stages[0][0])

    @property
    def host_port(self) -> tuple[str, int]:
        """The target's TCP address."""
        parts = self.address.split("/")
        return parts[2], int(parts[4])

    @property
    def route(self) -> tuple[Hop, ...]:
        """A route over the whole model."""
        hops: list[Hop] = []
        for peer, address, span in sorted(self.stages, key=lambda stage: stage[2].first):
            first = hops[-1].span.last if hops else span.first
            hops.append(Hop(peer=peer, address=address, span=Span(first, span.last)))
        return tuple(hops)

    def invite(self, role: Role = Role.CLIENT, *, uses: int = 1, expires_in_s: int = _HOUR_S) -> Invite:
        """Return a new invite of the swarm's owner."""
        state = SwarmState(self.owner)
        stored = state.membership()
        return new_invite(
            state.owner_key(),
            os.urandom(32),
            InviteTerms(role=role, expires_at_s=int(time.time()) + expires_in_s, max_uses=uses),
            SwarmSettings(
                network_key=stored.network_key,
                bootstrap=(self.address,),
                model=stored.model,
                dtype=stored.dtype,
                digest=stored.digest,
            ),
        )


@dataclass(slots=True)
class Enemy:
    """A hostile peer that is connected to the target. heard: what came back, the latest last."""

    ground: Ground
    transport: Libp2pTransport
    key: SigningKey
    grants: tuple[Grant, ...]
    heard: list[Message]
    is_lost: bool = False

    @property
    def target(self) -> PeerId:
        """The peer that is attacked."""
        return self.ground.peer

    async def greet(self, *, info: PeerInfo | None = None, grants: tuple[Grant, ...] | None = None) -> None:
        """Send a greeting."""
        sender = info or PeerInfo(peer=self.transport.peer, addresses=())
        shown = self.grants if grants is None else grants
        await self.say(Hello(version=PROTOCOL_VERSION, sender=sender, grants=shown))

    async def meet_others(self) -> None:
        """Connect to the other stages too, as a coordinator does."""
        hello = Hello(
            version=PROTOCOL_VERSION, sender=PeerInfo(peer=self.transport.peer, addresses=()), grants=self.grants
        )
        for peer, address, _ in self.ground.stages[1:]:
            with suppress(PeerError):
                await self.transport.connect(address, 5)
                self.transport.admit(PeerId(peer))
                await self.transport.send(PeerId(peer), encode(hello))

    async def say(self, message: Message, payload: bytes = b"") -> None:
        """Send a message."""
        await self.raw(encode(message, payload))

    async def raw(self, frame: bytes) -> None:
        """Send a frame; one that cannot be sent says that we were dropped."""
        try:
            await self.transport.send(self.target, frame)
        except PeerError:
            self.is_lost = True

    async def until(self, claim: Callable[[], bool], seconds: float = 8.0) -> bool:
        """Wait until a claim about what was heard holds; return whether it did in time."""
        with trio.move_on_after(seconds):
            while not claim():  # noqa: ASYNC110 - any of many changes
                await trio.sleep(0.02)
            return True
        return False

    async def must_be_dropped(self, why: str, seconds: float = 12.0) -> None:
        """Fail unless the target ends the connection.

        Raises:
            NotHeld: it does not.
        """
        if not await self.is_dropped(seconds):
            raise NotHeld(f"still connected: {why}")

    async def must_hear(self, kind: type[Message], why: str, seconds: float = 10.0) -> Message:
        """Return the first message of a kind.

        Raises:
            NotHeld: none comes.
        """
        if not await self.hears(kind, seconds):
            raise NotHeld(f"no {kind.__name__}: {why}")
        return next(each for each in self.heard if isinstance(each, kind))

    async def hears(self, kind: type[Message], seconds: float = 10.0) -> bool:
        """Return whether a message of a kind comes in time."""
        return await self.until(lambda: any(isinstance(each, kind) for each in self.heard), seconds)

    async def is_dropped(self, seconds: float) -> bool:
        """Return whether the target ends the connection in time."""
        return await self.until(lambda: self.is_lost, seconds)

    def failures(self) -> list[Failure]:
        """Return the failures that were heard."""
        return [each for each in self.heard if isinstance(each, Failure)]

    async def must_be_refused(self, *kinds: FailureKind, why: str) -> None:
        """Fail unless a session is refused for one of these reasons, or the connection ends.

        Raises:
            NotHeld: it is not.
        """
        if not await self.until(lambda: self.is_lost or any(each.kind in kinds for each in self.failures())):
            raise NotHeld(f"not refused: {why}; heard {[each.kind for each in self.failures()]}")

    async def answers_ping(self, seconds: float = 5.0) -> bool:
        """Return whether the target still answers us."""
        nonce = len(self.heard) + 1_000_000
        await self.say(Ping(nonce=nonce))
        return await self.until(lambda: any(isinstance(e, Pong) and e.nonce == nonce for e in self.heard), seconds)

    def opening(self, session: bytes, **changes: object) -> OpenSession:
        """Return a well-formed opening of ours, changed, and signed by us."""
        opened = OpenSession(
            session=session,
            epoch=0,
            route=self.ground.route,
            coordinator=Endpoint(self.transport.peer),
            model=self.ground.model,
            text=TextRequest(max_tokens=8),
            num_prompt=2,
            num_given=2,
            idle_timeout_s=20.0,
        )
        opened = msgspec.structs.replace(opened, **changes)
        return msgspec.structs.replace(opened, signature=self.transport.sign(signed_opening(opened)))


def window(session: bytes, **changes: object) -> Window:
    """Return a prompt's window of two tokens, changed."""
    first = Window(
        session=session, epoch=0, window=0, root=(0, -1), first_node=0, tokens=(1, 2), parents=(-1, 0), positions=(0, 1)
    )
    return msgspec.structs.replace(first, **changes)


@asynccontextmanager
async def enemy(
    ground: Ground,
    invite: Invite | None = None,
    *,
    is_greeting: bool = True,
    network_key: bytes | None = None,
    seed: bytes = b"",
    reads: bool = True,
) -> AsyncIterator[Enemy]:
    """Connect to the target. invite: a fresh one for a client by default. reads: take what comes back."""
    invite = invite or ground.invite()
    key = SigningKey(seed or os.urandom(32))
    with tempfile.TemporaryDirectory() as folder:
        identity = Path(folder) / "identity"
        identity.write_bytes(key.seed)
        identity.chmod(0o600)
        async with (
            open_libp2p(
                identity=identity,
                listen="/ip4/127.0.0.1/tcp/0",
                protocol=PROTOCOL_ID,
                max_frame_bytes=MAX_FRAME_BYTES,
                network_key=network_key or invite.network_key,
            ) as transport,
            trio.open_nursery() as nursery,
        ):
            made = Enemy(ground, transport, key, invite.admit(key.public), [])
            if reads:
                nursery.start_soon(_read, made)
            await transport.connect(ground.address, 10)
            transport.admit(ground.peer)
            if is_greeting:
                await made.greet()
                if reads:
                    await made.until(lambda: made.is_lost or any(isinstance(e, Members | Hello) for e in made.heard))
                    # The tail answers a coordinator on a connection of its own.
                    await made.meet_others()
            yield made
            nursery.cancel_scope.cancel()


async def _read(made: Enemy) -> None:
    while True:
        event = await made.transport.receive()
        if isinstance(event, Lost):
            made.is_lost = made.is_lost or event.peer == made.target
            continue
        with suppress(RemoteProtocolError, DsdError):
            message = decode(event.frame).message
            if isinstance(message, Heartbeat):
                # Who sends none is soon taken for dead.
                heard = (Heard(peer=event.sender, beat=message.beat, held_us=0, round_trip_us=0),)
                beat = Heartbeat(beat=time.time_ns() // 1_000_000, view=message.view, heard=heard)
                await made.transport.send(event.sender, encode(beat))
            elif event.sender == made.target or not isinstance(message, Hello):
                made.heard.append(message)

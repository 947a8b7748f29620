"""Attacks by somebody who has no invite, or one that is not good."""

import os
import socket
from contextlib import suppress

import msgspec
import trio

from dsd_p2p.errors import PeerError
from dsd_p2p.swarm.grants import issue
from dsd_p2p.types import PeerInfo, Span
from dsd_p2p.wire.codec import encode
from dsd_p2p.wire.membership import Heartbeat, Role
from dsd_p2p.wire.messages import Hello, Ping
from dsd_p2p.wire.version import PROTOCOL_VERSION
from node.lab.testnet.attacks.ground import Ground, NotHeld, enemy

_DOOR_S = 12.0


async def another_network_key(ground: Ground) -> None:
    """Connect with a network key of one's own."""
    is_in = False
    with suppress(PeerError, BaseExceptionGroup):
        async with enemy(ground, network_key=os.urandom(32), is_greeting=False):
            is_in = True
    if is_in:
        raise NotHeld("connected with another network key")


async def junk_bytes(ground: Ground) -> None:
    """Send junk instead of a handshake."""
    await _is_closed(ground, os.urandom(256))


async def web_request(ground: Ground) -> None:
    """Send a web request to the peer's port."""
    await _is_closed(ground, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


async def too_many_bytes(ground: Ground) -> None:
    """Send more than a stranger may before authentication."""
    await _is_closed(ground, bytes(8) + os.urandom(200_000))


async def half_open(ground: Ground) -> None:
    """Hold two hundred connections that say nothing."""
    held = []
    with suppress(OSError):
        for _ in range(100):
            held.append(socket.create_connection(ground.host_port, timeout=2))
    try:
        # Members that are connected already must not notice; they are asked by the honest client beside this.
        for connection in held[-1:]:
            connection.settimeout(_DOOR_S)
            with suppress(OSError):
                if await trio.to_thread.run_sync(connection.recv, 1) != b"":
                    raise NotHeld("a silent connection was answered")
    finally:
        for connection in held:
            connection.close()


async def no_grants(ground: Ground) -> None:
    """Greet without grants, with the network key."""
    async with enemy(ground, is_greeting=False) as attacker:
        await attacker.greet(grants=())
        await attacker.must_be_dropped("it showed no grants")


async def stolen_grants(ground: Ground) -> None:
    """Greet with the grants of another member."""
    async with enemy(ground, is_greeting=False) as attacker:
        await attacker.greet(grants=ground.invite().admit(os.urandom(32)))
        await attacker.must_be_dropped("the grants name another key")


async def expired_invite(ground: Ground) -> None:
    """Greet with an invite that has expired."""
    async with enemy(ground, ground.invite(expires_in_s=-60)) as attacker:
        await attacker.must_be_dropped("its invite has expired")


async def forged_grant(ground: Ground) -> None:
    """Give oneself more with a changed grant."""
    async with enemy(ground, is_greeting=False) as attacker:
        forged = tuple(msgspec.structs.replace(grant, role=Role.STAGE) for grant in attacker.grants)
        await attacker.greet(grants=forged)
        await attacker.must_be_dropped("its grant was changed")


async def own_swarms_grant(ground: Ground) -> None:
    """Greet with a grant of a swarm of one's own."""
    async with enemy(ground, is_greeting=False) as attacker:
        mine = issue(attacker.key, attacker.key.public, role=Role.STAGE, expires_at_s=1 << 40)
        await attacker.greet(grants=(mine,))
        await attacker.must_be_dropped("its grant is its own")


async def used_up_invite(ground: Ground) -> None:
    """Join twice with an invite for one."""
    invite = ground.invite(uses=1)
    async with enemy(ground, invite) as first:
        if not await first.answers_ping():
            raise NotHeld("the first use was refused")
        async with enemy(ground, invite) as second:
            await second.must_be_dropped("the invite was for one")


async def client_lets_in_a_stage(ground: Ground) -> None:
    """Let a stage in with a client's key."""
    invite = ground.invite()
    async with enemy(ground, invite, is_greeting=False) as attacker:
        made = issue(attacker.key, attacker.key.public, role=Role.STAGE, expires_at_s=invite.grants[-1].expires_at_s)
        await attacker.greet(grants=(*attacker.grants, made))
        await attacker.must_be_dropped("a client may not let stages in")


async def words_before_a_greeting(ground: Ground) -> None:
    """Speak before a greeting."""
    async with enemy(ground, is_greeting=False) as attacker:
        await attacker.say(Heartbeat(beat=1, view=bytes(8)))
        await attacker.must_be_dropped("it spoke before it greeted")


async def silence_instead_of_a_greeting(ground: Ground) -> None:
    """Connect and stay silent."""
    async with enemy(ground, is_greeting=False) as attacker:
        await attacker.transport.send(attacker.target, b"")
        await attacker.must_be_dropped("it never greeted", 16)


async def strangers_large_frame(ground: Ground) -> None:
    """Send a large frame before the greeting."""
    async with enemy(ground, is_greeting=False) as attacker:
        await attacker.raw(encode(Ping(nonce=1, padding=bytes(200_000))))
        await attacker.must_be_dropped("its first frame was large")


async def another_peers_name(ground: Ground) -> None:
    """Greet in another peer's name."""
    async with enemy(ground, is_greeting=False) as attacker:
        await attacker.greet(info=PeerInfo(peer=ground.stages[-1][0], addresses=()))
        await attacker.must_be_dropped("it greeted as another peer")


async def another_version(ground: Ground) -> None:
    """Greet with another version of the protocol."""
    async with enemy(ground, is_greeting=False) as attacker:
        me = PeerInfo(peer=attacker.transport.peer, addresses=())
        await attacker.say(Hello(version=PROTOCOL_VERSION + 1, sender=me, grants=attacker.grants))
        await attacker.must_be_dropped("it speaks another version")


async def client_with_layers(ground: Ground) -> None:
    """Offer layers with a client's invite."""
    async with enemy(ground, is_greeting=False) as attacker:
        info = PeerInfo(peer=attacker.transport.peer, addresses=(), span=Span(0, 1), num_layers=30, model=ground.model)
        await attacker.greet(info=info)
        await attacker.must_be_dropped("a client offered layers")


async def _is_closed(ground: Ground, data: bytes) -> None:
    def send() -> None:
        with socket.create_connection(ground.host_port, timeout=5) as connection:
            connection.settimeout(_DOOR_S)
            with suppress(OSError):
                connection.sendall(data)
                while connection.recv(4096):
                    pass
                return
            if connection.fileno() >= 0 and not _is_reset(connection):
                raise NotHeld("the connection stayed open")

    await trio.to_thread.run_sync(send)


def _is_reset(connection: socket.socket) -> bool:
    try:
        connection.settimeout(0.1)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


ATTACKS = (
    another_network_key,
    junk_bytes,
    web_request,
    too_many_bytes,
    half_open,
    no_grants,
    stolen_grants,
    expired_invite,
    forged_grant,
    own_swarms_grant,
    used_up_invite,
    client_lets_in_a_stage,
    words_before_a_greeting,
    silence_instead_of_a_greeting,
    strangers_large_frame,
    another_peers_name,
    another_version,
    client_with_layers,
)

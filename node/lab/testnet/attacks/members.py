"""Attacks on what members believe of each other, by a member with a client's invite or a stage that went bad."""

import os
import socket
import time

import msgspec
import trio

from dsd_p2p.swarm.grants import choose, new_network_key, revoke
from dsd_p2p.swarm.records import sign_record
from dsd_p2p.types import PeerInfo, Span
from dsd_p2p.wire.membership import Heartbeat, MemberRecord, Members, MemberState, PeerProfile, Revocation, Role
from dsd_p2p.wire.messages import Hello, OpenSession
from dsd_p2p.wire.version import PROTOCOL_VERSION
from node.lab.testnet.attacks.ground import Enemy, Ground, NotHeld, enemy
from node.member.control import PeerReport, Revoke, Status, ask_node
from node.member.state import SwarmState

_YEAR_MS = 365 * 86400 * 1000


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _record(
    attacker: Enemy,
    *,
    peer: str = "",
    info: PeerInfo | None = None,
    profile: PeerProfile | None = None,
    ahead_ms: int = 0,
) -> MemberRecord:
    """Return a record signed by the attacker, of itself or of another peer."""
    address = f"/ip4/127.0.0.1/tcp/9/p2p/{attacker.transport.peer}"
    now_ms = _now_ms() + ahead_ms
    record = MemberRecord(
        info=info or PeerInfo(peer=peer or attacker.transport.peer, addresses=(address,)),
        incarnation=now_ms,
        sequence=now_ms,
        state=MemberState.SERVING,
        grants=attacker.grants,
        profile=profile or PeerProfile(),
    )
    return sign_record(record, attacker.key)


async def _report(ground: Ground) -> PeerReport:
    report = await ask_node(SwarmState(ground.owner).control_socket, Status(), 20)
    assert isinstance(report, PeerReport)
    return report


async def _must_know(ground: Ground, peer: str, why: str) -> None:
    """Fail unless the target still counts a stage as alive."""
    members = {member.peer: member for member in (await _report(ground)).members}
    if peer not in members or not members[peer].is_alive or members[peer].state == "left":
        raise NotHeld(why)


async def record_of_another(ground: Ground) -> None:
    """Say in another stage's name that it has left."""
    victim = ground.stages[-1][0]
    async with enemy(ground) as attacker:
        forged = msgspec.structs.replace(_record(attacker, peer=victim, ahead_ms=1000), state=MemberState.LEFT)
        await attacker.say(Members(records=(forged,)))
        await trio.sleep(2)
        await _must_know(ground, victim, "a forged record drove a stage out")


async def record_of_the_target(ground: Ground) -> None:
    """Make the target outdate its own record with an absurd one."""
    async with enemy(ground) as attacker:
        absurd = msgspec.structs.replace(
            _record(attacker, peer=ground.peer), incarnation=1 << 49, sequence=1 << 49, signature=bytes(64)
        )
        await attacker.say(Members(records=(absurd,)))
        await trio.sleep(2)
    async with enemy(ground) as other:
        # A view that differs from the target's asks for all that it knows.
        await other.say(Heartbeat(beat=1, view=os.urandom(8)))
        told = await other.must_hear(Members, "the target tells nothing of itself any more")
        assert isinstance(told, Members)
        mine = [record for record in told.records if record.info.peer == ground.peer]
        if not mine or mine[0].incarnation > _now_ms():
            raise NotHeld("the target's own record was outdated")


async def record_far_ahead(ground: Ground) -> None:
    """Publish a record of oneself from next year."""
    async with enemy(ground) as attacker:
        await attacker.say(Members(records=(_record(attacker, ahead_ms=_YEAR_MS),)))
        await attacker.must_be_dropped("its record is a year ahead")


async def client_offers_a_drafter(ground: Ground) -> None:
    """Offer a drafter with a client's invite, to be asked for others' requests."""
    async with enemy(ground) as attacker:
        await attacker.say(Members(records=(_record(attacker, profile=PeerProfile(max_layers=30, drafter="x")),)))
        await attacker.must_be_dropped("a client offered a drafter")


async def forged_revocation(ground: Ground) -> None:
    """Revoke a stage without the owner's key."""
    victim = ground.stages[-1][0]
    async with enemy(ground) as attacker:
        swarm = SwarmState(ground.owner).membership().swarm
        forged = revoke(attacker.key, swarm, os.urandom(32))
        await attacker.say(Members(revocations=(forged,)))
        await attacker.must_be_dropped("it forged a revocation")
        await _must_know(ground, victim, "a forged revocation worked")


async def unsigned_revocations(ground: Ground) -> None:
    """Send a thousand revocations that nobody signed."""
    async with enemy(ground) as attacker:
        many = tuple(Revocation(subject=os.urandom(32), signature=bytes(64)) for _ in range(1024))
        await attacker.say(Members(revocations=many))
        await attacker.must_be_dropped("it sent unsigned revocations")


async def forged_choice(ground: Ground) -> None:
    """Choose the swarm's drafter without the owner's key."""
    async with enemy(ground) as attacker:
        swarm = SwarmState(ground.owner).membership().swarm
        await attacker.say(Members(choice=choose(attacker.key, swarm, "ngram", _now_ms() + 1000)))
        await attacker.must_be_dropped("it forged the owner's choice")


async def forged_network_key(ground: Ground) -> None:
    """Give the swarm a network key of one's own."""
    async with enemy(ground) as attacker:
        swarm = SwarmState(ground.owner).membership().swarm
        await attacker.say(new_network_key(attacker.key, swarm, os.urandom(32), (), _now_ms() + 1000))
        await attacker.must_be_dropped("it forged a network key")
        if not await _still_joins(ground):
            raise NotHeld("the network key was changed")


async def junk_records(ground: Ground) -> None:
    """Send records that are checked for nothing, again and again."""
    async with enemy(ground) as attacker:
        stage = ground.stages[-1][0]
        bad = tuple(msgspec.structs.replace(_record(attacker, peer=stage), sequence=number) for number in range(64))
        for _ in range(50):
            await attacker.say(Members(records=bad))
        async with enemy(ground) as honest:
            if not await honest.answers_ping(5):
                raise NotHeld("junk records kept the target from answering others")


async def views_that_differ(ground: Ground) -> None:
    """Ask for everything known with each of two hundred heartbeats."""
    async with enemy(ground) as attacker:
        before = sum(isinstance(each, Members) for each in attacker.heard)
        for beat in range(200):
            await attacker.say(Heartbeat(beat=beat + 1, view=os.urandom(8)))
        await trio.sleep(3)
        sent = sum(isinstance(each, Members) for each in attacker.heard) - before
        if sent > 12:
            raise NotHeld(f"{sent} answers with everything known within three seconds")


async def dial_on_command(ground: Ground) -> None:
    """Name eighty addresses of one's own for the target to dial."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        port = listener.getsockname()[1]
        async with enemy(ground, ground.invite(Role.STAGE)) as attacker:
            known = tuple(
                PeerInfo(
                    peer=f"{attacker.transport.peer[:-3]}{number:03}",
                    addresses=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{attacker.transport.peer}",) * 4,
                    span=Span(0, 1),
                    num_layers=30,
                    model=ground.model,
                )
                for number in range(64)
            )
            me = PeerInfo(peer=attacker.transport.peer, addresses=())
            await attacker.say(Hello(version=PROTOCOL_VERSION, sender=me, known=known, grants=attacker.grants))
            await trio.sleep(4)
        num_dials = 0
        while num_dials < 100:
            try:
                listener.accept()[0].close()
            except TimeoutError:
                break
            num_dials += 1
        if num_dials > 8:
            raise NotHeld(f"it dialled {num_dials} times where it was told to")


async def short_context(ground: Ground) -> None:
    """Announce a context of one token, to break every request."""
    async with enemy(ground, ground.invite(Role.STAGE)) as attacker:
        info = PeerInfo(
            peer=attacker.transport.peer,
            addresses=(),
            span=Span(0, 30),
            num_layers=30,
            model=ground.model,
            max_positions=1,
        )
        profile = PeerProfile(layer_us=1, layer16_us=1, max_layers=30)
        await attacker.say(Members(records=(_record(attacker, info=info, profile=profile),)))
        # The honest client writes beside this: it must not be routed here.
        for _ in range(10):
            await attacker.say(Heartbeat(beat=int(time.time() * 10), view=bytes(8), interval_ms=500))
            await trio.sleep(0.5)
        if any(isinstance(each, OpenSession) for each in attacker.heard):
            raise NotHeld("a stage with a context of one token was chosen")


async def revoked_peer(ground: Ground) -> None:
    """Stay, and come back, after a revocation."""
    invite = ground.invite(uses=2)
    async with enemy(ground, invite) as attacker:
        await _revoke(ground, attacker.key.public)
        await attacker.must_be_dropped("it was revoked", 3.0)
        async with enemy(ground, invite, seed=attacker.key.seed) as again:
            await again.must_be_dropped("it came back after its revocation", 3.0)


async def revoked_invite(ground: Ground) -> None:
    """Use what is left of an invite whose holder was thrown out."""
    invite = ground.invite(uses=8)
    async with enemy(ground, invite):
        pass
    await _revoke(ground, invite.grants[-1].subject)
    async with enemy(ground, invite) as other:
        await other.must_be_dropped("its invite was revoked", 3.0)


async def _revoke(ground: Ground, subject: bytes) -> None:
    state = SwarmState(ground.owner)
    revocation = revoke(state.owner_key(), state.membership().swarm, subject)
    await ask_node(state.control_socket, Revoke(revocation=revocation), 20)


async def _still_joins(ground: Ground) -> bool:
    async with enemy(ground) as honest:
        return await honest.answers_ping()


ATTACKS = (
    record_of_another,
    record_of_the_target,
    record_far_ahead,
    client_offers_a_drafter,
    forged_revocation,
    unsigned_revocations,
    forged_choice,
    forged_network_key,
    junk_records,
    views_that_differ,
    dial_on_command,
    short_context,
    revoked_peer,
    revoked_invite,
)

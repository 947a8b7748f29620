"""Members of a swarm in virtual time: they find each other, notice who is gone, keep strangers out, and route around."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from membership_keys import NOW_S, OWNER, STRANGER, invite, key
from memory_members import INTERVAL_S, NUM_LAYERS, Node, settled
from msgspec.structs import replace
from swarms import TEST_MODEL

from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.errors import CoverageLost, PeerDisconnected, PeerTimeout, RemoteProtocolError
from dsd_p2p.peers.rekeying import SPREAD_S
from dsd_p2p.placement.route import Detour
from dsd_p2p.swarm.grants import new_network_key, revoke
from dsd_p2p.swarm.records import sign_record
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import PeerInfo, Span
from dsd_p2p.wire.membership import MemberRecord, Members, MemberState, PeerProfile, Role


@asynccontextmanager
async def swarm(*spans, **options):
    """Nodes 1, 2, …; the first is everybody's bootstrap."""
    network = MemoryNetwork()
    async with trio.open_nursery() as nursery:
        nodes = [
            await nursery.start(Node(network, number, span=span, bootstrap=() if number == 1 else (1,), **options).run)
            for number, span in enumerate(spans, start=1)
        ]
        await settled(nodes)
        yield network, nursery, nodes
        nursery.cancel_scope.cancel()


def directory(node, **options):
    return SwarmDirectory(node.membership, model=TEST_MODEL, num_layers=NUM_LAYERS, **options)


async def test_all_meet_all_through_one(autojump_clock):
    async with swarm(Span(0, 10), Span(10, 20), Span(20, 30), Span(0, 30)) as (_, _, nodes):
        await trio.sleep(3 * INTERVAL_S)
        for node in nodes:
            assert set(node.links.connected) == {other.peer for other in nodes} - {node.peer}
            assert len({other.registry.view for other in nodes}) == 1
            for member in node.registry.members():
                assert member.round_trip_s is not None
                assert set(member.neighbours_s) == {other.peer for other in nodes} - {member.peer}


async def test_a_member_found_on_the_way_is_tried_when_the_known_addresses_are_dead(autojump_clock):
    async with swarm(Span(0, 15)) as (network, nursery, nodes):
        lonely = await nursery.start(Node(network, 3, span=Span(15, 30), bootstrap=(77,)).run)
        await trio.sleep(20 * INTERVAL_S)
        assert not lonely.links.connected
        for number in range(50, 70):
            lonely.membership.dialer.also_try(f"memory:{key(number).peer}")
        lonely.membership.dialer.also_try(f"memory:{nodes[0].peer}")
        await settled([nodes[0], lonely])


async def test_a_killed_member_is_gone_and_a_restarted_one_counts_once(autojump_clock):
    async with swarm(Span(0, 15), Span(15, 30), Span(15, 30)) as (network, nursery, nodes):
        nodes[2].scope.cancel()
        await settled(nodes[:2], within_s=2 * INTERVAL_S + 0.5)
        again = await nursery.start(Node(network, 3, span=Span(0, 30), bootstrap=(1,)).run)
        await settled([*nodes[:2], again])
        spans = [str(member.record.info.span) for member in nodes[0].registry.members()]
        assert sorted(spans) == ["[0, 15)", "[0, 30)", "[15, 30)"]


async def test_a_frozen_member_is_gone_within_two_beats(autojump_clock):
    """It keeps its connections and takes frames in, as a stopped process does; only its heartbeats are missing."""
    async with swarm(Span(0, 15), Span(15, 30), Span(15, 30)) as (_, _, nodes):
        frozen = nodes[2]

        async def nothing(*_arguments):
            await trio.sleep_forever()

        frozen.links.transport.send = nothing
        start_s = trio.current_time()
        await settled_without(frozen, nodes[:2])
        assert trio.current_time() - start_s < 2 * INTERVAL_S + 0.5


async def settled_without(gone, nodes):
    with trio.fail_after(20):
        while any(gone.peer in node.alive for node in nodes):  # noqa: ASYNC110 - any of many changes
            await trio.sleep(0.05)


async def test_leaving_is_announced(autojump_clock):
    async with swarm(Span(0, 15), Span(15, 30), Span(15, 30)) as (_, _, nodes):
        await nodes[2].membership.leave()
        await trio.sleep(0.01)
        for node in nodes[:2]:
            assert nodes[2].peer not in node.alive
            assert node.registry.record_of(nodes[2].peer).state is MemberState.LEFT


async def test_a_one_way_link_is_no_link(autojump_clock):
    async with swarm(Span(0, 15), Span(15, 30), interval_s=0.5) as (network, _, nodes):
        a, b = nodes
        original = network.transports[a.peer].send

        async def lossy(to, frame):
            if to != b.peer:
                await original(to, frame)

        network.transports[a.peer].send = lossy
        await settled_without(b, [a])
        await settled_without(a, [b])


@pytest.mark.parametrize(
    ("grants", "words"),
    [
        ((), "dsd invite"),
        (invite(owner=STRANGER).admit(key(7).public), "one of this swarm"),
        (invite(expires_at_s=NOW_S - 5).admit(key(7).public), "expired"),
        (invite().admit(key(6).public), "a grant for the peer that shows it"),
        (tuple(replace(g, max_uses=1000) for g in invite().admit(key(7).public)), "signature"),
    ],
    ids=["stranger", "other-swarm", "expired", "stolen", "forged"],
)
async def test_who_does_not_belong_gets_nothing_and_a_clear_line(autojump_clock, caplog, grants, words):
    async with swarm(Span(0, 30)) as (network, nursery, (node,)):
        outsider = Node(network, 7, grants=grants, belongs=False)
        await nursery.start(outsider.run)
        with pytest.raises(PeerDisconnected, match=words):
            await outsider.links.connect(f"memory:{node.peer}", 5)
        assert node.alive == {node.peer}
        assert node.registry.record_of(outsider.peer) is None
        assert any(words in record.getMessage() for record in caplog.records if record.levelname == "WARNING")


async def test_a_revoked_member_is_thrown_out_everywhere(autojump_clock):
    async with swarm(Span(0, 10), Span(10, 20), Span(20, 30)) as (_, _, nodes):
        await nodes[0].membership.revoke(revoke(OWNER, OWNER.public, nodes[2].key.public))
        await settled_without(nodes[2], nodes[:2])
        with trio.fail_after(5):
            while nodes[2].links.connected:  # noqa: ASYNC110 - any of many changes
                await trio.sleep(0.05)
        with pytest.raises(PeerDisconnected, match="revoked"):
            await nodes[2].links.connect(f"memory:{nodes[1].peer}", 5)
        assert nodes[1].registry.admission.revocations, "the one who was not told by the owner knows too"


async def test_a_new_network_key_reaches_all_but_those_revoked(autojump_clock):
    async with swarm(Span(0, 10), Span(10, 20), Span(20, 30), Span(0, 30)) as (_, _, nodes):
        *stay, revoked = nodes
        out = revoke(OWNER, OWNER.public, revoked.key.public)
        rekey = new_network_key(OWNER, OWNER.public, bytes(range(32)), [out], 7)
        forged = new_network_key(STRANGER, OWNER.public, bytes(32), [], 9)
        with pytest.raises(RemoteProtocolError, match="owner's"):
            await nodes[0].rekeying.take(forged)
        await nodes[0].rekeying.take(rekey)
        await trio.sleep(SPREAD_S / 2)
        assert [node.network_keys for node in stay] == [[bytes(range(32))]] * 3
        assert revoked.network_keys == []
        # An older key, or the same one again, changes nothing.
        await nodes[1].rekeying.take(rekey)
        await nodes[1].rekeying.take(new_network_key(OWNER, OWNER.public, bytes(32), [out], 6))
        assert nodes[1].network_keys == [bytes(range(32))]
        await trio.sleep(SPREAD_S)
        # Connections have ended and come back.
        await settled(stay)
        assert revoked.links.connected == set()


async def test_nobody_can_outdate_our_record_in_our_name(autojump_clock):
    """A forged record of ours with an absurd age made every member drop us."""
    async with swarm(Span(0, 15), Span(15, 30)) as (_, _, nodes):
        victim, liar = nodes
        mine = victim.registry.record_of(victim.peer)
        for age in ((1 << 50) - 1, mine.incarnation + 5):
            forged = replace(mine, incarnation=age, signature=b"x" * 64)
            await liar.links.send(victim.peer, Members(records=(forged,)))
        await trio.sleep(3 * INTERVAL_S)
        assert victim.registry.record_of(victim.peer).incarnation == mine.incarnation
        assert liar.alive == {victim.peer, liar.peer}
        # A record that we did sign, before a restart with a clock that was ahead, is outdated.
        signed = sign_record(replace(mine, incarnation=mine.incarnation + 60_000, signature=b""), victim.key)
        await liar.links.send(victim.peer, Members(records=(signed,)))
        await trio.sleep(3 * INTERVAL_S)
        assert victim.registry.record_of(victim.peer).incarnation == mine.incarnation + 60_001
        await settled(nodes)


async def test_a_revoked_peer_that_hides_its_record_is_thrown_out(autojump_clock):
    async with swarm(Span(0, 15)) as (network, nursery, (node,)):
        hidden = await nursery.start(Node(network, 5, belongs=False).run)
        await hidden.links.connect(f"memory:{node.peer}", 5)
        assert hidden.peer in node.links.connected
        assert node.registry.record_of(hidden.peer) is None
        await node.membership.revoke(revoke(OWNER, OWNER.public, hidden.key.public))
        with trio.fail_after(3):
            while hidden.peer in node.links.connected:  # noqa: ASYNC110 - any of many changes
                await trio.sleep(0.05)


async def test_who_is_back_is_dialled_at_once(autojump_clock):
    """A stage dials no clients, so a client must notice, however long it has tried in vain."""
    async with swarm(Span(0, 15), Span(15, 30), None) as (network, nursery, (stage, lost, client)):
        lost.scope.cancel()
        await trio.sleep(65)
        assert lost.peer not in client.links.connected
        again = await nursery.start(Node(network, 2, span=Span(15, 30), bootstrap=(1,)).run)
        with trio.fail_after(6):
            await settled([stage, again, client])
        assert again.peer in client.links.connected


async def test_records_do_not_make_a_member_dial_everywhere_at_once(autojump_clock, monkeypatch):
    async with swarm(Span(0, 15)) as (_, nursery, (node,)):
        dialled, most = [], 0
        num_open = 0

        async def connect(address, _timeout_s):
            nonlocal num_open, most
            num_open += 1
            most = max(most, num_open)
            dialled.append(address)
            await trio.sleep(5)
            num_open -= 1
            raise PeerTimeout("nobody there")

        monkeypatch.setattr(node.links, "connect", connect)
        for number in range(20, 70):
            info = PeerInfo(peer=key(number).peer, addresses=tuple(f"memory:{number}-{i}" for i in range(8)))
            made = MemberRecord(
                info=info,
                incarnation=NOW_S * 1000,
                sequence=NOW_S * 1000,
                state=MemberState.SERVING,
                grants=invite(seed=bytes([number]) * 32).admit(key(number).public),
                profile=PeerProfile(max_layers=3),
            )
            node.registry.merge(sign_record(made, key(number)), NOW_S)
        await trio.sleep(20)
        assert 8 <= len(dialled) <= 40
        assert most <= 8
        nursery.cancel_scope.cancel()


async def test_chains_follow_the_members(autojump_clock):
    async with swarm(Span(0, 20), Span(10, 30), Span(15, 30)) as (network, nursery, nodes):
        client = Node(network, 9, grants=invite(role=Role.CLIENT, max_uses=9).admit(key(9).public), bootstrap=(1,))
        await nursery.start(client.run)
        await settled([*nodes, client])
        chain = await directory(client).find()
        assert chain.hops[0].span.first == 0
        assert chain.hops[0].peer == nodes[0].peer
        assert chain.hops[0].span.last == chain.hops[1].span.first
        second = chain.hops[1].peer
        other = next(node for node in nodes[1:] if node.peer != second)
        assert [hop.peer for hop in (await directory(client).find(Detour(peers=frozenset([second])))).hops] == [
            nodes[0].peer,
            other.peer,
        ]
        with pytest.raises(CoverageLost, match="failed this request"):
            await directory(client, coverage_timeout_s=1).find(Detour(peers=frozenset([nodes[0].peer])))
        nodes[0].scope.cancel()
        await settled_without(nodes[0], [client])
        with pytest.raises(CoverageLost, match=r"no peer serves layers \[0, 10\)"):
            await directory(client, coverage_timeout_s=10).find()

        async def come_back():
            await trio.sleep(5)
            await nursery.start(Node(network, 1, span=Span(0, 15)).run)

        nursery.start_soon(come_back)
        chain = await directory(client, coverage_timeout_s=60).find()
        assert chain.hops[0].span.last <= 15


async def test_nobody_at_all_is_said_so(autojump_clock):
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        node = await nursery.start(Node(MemoryNetwork(), 1).run)
        with pytest.raises(CoverageLost, match="dsd doctor"):
            await directory(node, coverage_timeout_s=2).find()
        nursery.cancel_scope.cancel()


async def test_a_route_is_planned_ahead_and_given_up_with_its_members(autojump_clock, monkeypatch):
    async with swarm(Span(0, 15), Span(15, 30), Span(15, 30)) as (_, nursery, nodes):
        directory_ = directory(nodes[0])
        nursery.start_soon(directory_.plan_ahead)
        await trio.sleep(2 * INTERVAL_S)
        plans = []
        plan = directory_.plan
        monkeypatch.setattr(directory_, "plan", lambda *detour: plans.append(detour) or plan(*detour))
        route = await directory_.find()
        assert not plans, "a request planned although a route was ready"
        used = next(node for node in nodes if node.peer == route.hops[1].peer)
        other = next(node for node in nodes[1:] if node is not used)
        avoiding = await directory_.find(Detour(peers=frozenset([used.peer])))
        assert avoiding.hops[1].peer == other.peer
        assert len(plans) == 1
        await used.membership.leave()
        await trio.sleep(0.01)
        assert (await directory_.find()).hops[1].peer == other.peer

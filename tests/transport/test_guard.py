"""Strangers at a listening socket: private network, gate, deadlines, budgets; and ways around a closed one: relays."""

import os
import secrets
import time
from contextlib import AsyncExitStack, suppress

import pytest
import trio
from libp2p.host.exceptions import StreamFailure
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError

from dsd_p2p.errors import PeerDisconnected, PeerError, PeerTimeout
from dsd_p2p.transport.base import Lost, Received
from dsd_p2p.transport.libp2p import guard, host, open_libp2p, relay
from dsd_p2p.types import PeerId

PROTOCOL = "/dsd-test/1"
LOCALHOST = "/ip4/127.0.0.1/tcp/0"
KEY = bytes(range(32))


def open_host(folder, name, **options):
    options = {"listen": LOCALHOST, "max_frame_bytes": 1 << 22, "network_key": KEY} | options
    return open_libp2p(identity=folder / name, protocol=PROTOCOL, **options)


async def received(transport):
    with trio.fail_after(10):
        while not isinstance(event := await transport.receive(), Received):
            pass
    return event.frame


async def lost(transport):
    with trio.fail_after(15):
        while not isinstance(event := await transport.receive(), Lost):
            pass
    return event


def tcp_address(transport) -> tuple[str, int]:
    parts = transport.addresses[0].split("/")
    return parts[2], int(parts[4])


async def test_peers_with_the_network_key_talk(tmp_path):
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        await a.connect(b.addresses[0], 10)
        for end, other in ((a, b), (b, a)):
            await end.send(other.peer, b"hello")
            assert await received(other) == b"hello"
        assert not a.is_relayed(b.peer)


async def test_after_a_change_of_the_network_key_only_the_new_one_counts(tmp_path):
    new = bytes(reversed(KEY))
    async with (
        open_host(tmp_path, "a") as a,
        open_host(tmp_path, "b") as b,
        open_host(tmp_path, "thief") as thief,
    ):
        await a.connect(b.addresses[0], 10)
        for end in (a, b):
            end.change_network_key(new)
        # What is open stays until it is dropped.
        await a.send(b.peer, b"still here")
        assert await received(b) == b"still here"
        await a.disconnect(b.peer, "new key")
        for end in (a, b):
            await lost(end)
        with pytest.raises(PeerDisconnected, match="network key"):
            await thief.connect(b.addresses[0], 5)
        await a.connect(b.addresses[0], 10)
        await a.send(b.peer, b"back")
        assert await received(b) == b"back"


@pytest.mark.parametrize("theirs", [bytes(32), None])
async def test_another_network_key_or_none_is_refused_at_once(tmp_path, theirs):
    async with open_host(tmp_path, "a", network_key=theirs) as a, open_host(tmp_path, "b") as b:
        start_s = time.monotonic()
        with pytest.raises(PeerError) as raised:
            await a.connect(b.addresses[0], 2)
        assert time.monotonic() - start_s < 6
        assert b._host.get_network().get_total_connections() == 0
        if theirs is not None:
            # A dialer without any key only sees the connection close.
            assert isinstance(raised.value, PeerTimeout) or "network key" in str(raised.value)


async def test_a_stranger_reaches_nothing_but_identify_and_our_greeting(tmp_path):
    async def answer(stream):
        await stream.write(b"reached")
        await stream.close()

    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        await a.connect(b.addresses[0], 10)
        target = ID.from_string(b.peer)
        b._host.set_stream_handler("/other/1", answer)
        for protocol in ("/other/1", "/libp2p/circuit/relay/0.2.0/stop", "/ipfs/kad/1.0.0"):
            with pytest.raises((StreamFailure, MuxedStreamError)):
                await a._host.new_stream(target, [protocol])
        assert await a._host.new_stream(target, ["/ipfs/id/1.0.0"]) is not None
        b.admit(a.peer)
        stream = await a._host.new_stream(target, ["/other/1"])
        with trio.fail_after(5):
            assert await stream.read(7) == b"reached"


async def test_a_strangers_frames_are_small(tmp_path):
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        await a.connect(b.addresses[0], 10)
        await a.send(b.peer, bytes(1 << 17))
        assert "131072 bytes" in (await lost(b)).reason
        await lost(a)
        b.admit(a.peer)
        await a.connect(b.addresses[0], 10)
        await a.send(b.peer, bytes(1 << 17))
        assert len(await received(b)) == 1 << 17


async def test_who_is_not_let_in_does_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_ADMISSION_S", 0.5)
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        await a.connect(b.addresses[0], 10)
        await lost(a)
        await lost(b)
        b.admit(a.peer)
        await a.connect(b.addresses[0], 10)
        with trio.move_on_after(1.5) as scope:
            await lost(a)
        assert scope.cancelled_caught, "who was let in stays"


async def test_a_listener_outlives_many_connections(tmp_path, monkeypatch):
    """libp2p's own accept never gives its token back: the 250th connection would be the last."""
    monkeypatch.setattr(guard, "_CONNECTIONS_PER_S", 1000.0)
    async with open_host(tmp_path, "b") as b, open_host(tmp_path, "a") as a:
        b.admit(a.peer)
        for _ in range(270):
            await a.connect(b.addresses[0], 10)
            await a.disconnect(b.peer, "again")
        await a.connect(b.addresses[0], 10)


async def test_an_address_that_connects_again_and_again_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_CONNECTIONS_PER_S", 0.01)
    monkeypatch.setattr(guard, "_BURST_CONNECTIONS", 5)
    async with open_host(tmp_path, "b") as b, open_host(tmp_path, "a") as a:
        b.admit(a.peer)
        for _ in range(5):
            await a.connect(b.addresses[0], 10)
            await a.disconnect(b.peer, "again")
        with pytest.raises(PeerTimeout):
            await a.connect(b.addresses[0], 1)


async def test_who_sends_what_is_of_no_use_is_read_more_slowly(tmp_path, monkeypatch):
    """Of 60 frames a second: twenty useful ones take a third of a second, twenty useless ones five times that."""
    monkeypatch.setattr(host, "_FRAMES_PER_S", 60.0)
    monkeypatch.setattr(host, "_BURST_FRAMES", 1)
    seconds = {}
    for is_useless in (False, True):
        async with open_host(tmp_path, f"b{is_useless}") as b, open_host(tmp_path, f"a{is_useless}") as a:
            await a.connect(b.addresses[0], 10)
            b.admit(a.peer)
            start_s = trio.current_time()
            # The first was due when the stream was opened, before we looked at the clock.
            await a.send(b.peer, b"first")
            await received(b)
            for _ in range(20):
                await a.send(b.peer, b"x")
            for _ in range(20):
                await received(b)
                if is_useless:
                    b.penalise(a.peer)
            seconds[is_useless] = trio.current_time() - start_s
    # What the pace itself makes of it: 19/60 s and 19*5/60 s at the least, however busy the machine is.
    assert seconds[False] >= 19 / 60
    assert seconds[True] >= 18 * 5 / 60


@pytest.mark.parametrize("start", [b"", os.urandom(300), bytes(8), bytes((0x80, 0x80, 0x80, 0x80, 0x01))])
async def test_half_made_connections_are_few_and_end(tmp_path, monkeypatch, start):
    """Silent ones, junk, half a nonce, an announced gigabyte: an honest peer gets in meanwhile, nothing is left of them."""
    monkeypatch.setattr(guard, "_MAX_PENDING", 16)
    monkeypatch.setattr(guard, "_MAX_PENDING_OF_ADDRESS", 1000)
    async with open_host(tmp_path, "b", network_key=None) as b, open_host(tmp_path, "a", network_key=None) as a:
        b.admit(a.peer)
        async with AsyncExitStack() as stack:
            for _ in range(200):
                stream = await stack.enter_async_context(await trio.open_tcp_stream(*tcp_address(b)))
                if start:
                    with suppress(trio.BrokenResourceError):
                        await stream.send_all(start)
            await a.connect(b.addresses[0], 10)
            await a.send(b.peer, b"honest")
            assert await received(b) == b"honest"
        with trio.fail_after(15):
            while len(b._host.get_network().connections) > 1:  # noqa: ASYNC110 - libp2p tells nobody
                await trio.sleep(0.05)


async def test_frames_go_through_a_relay_both_ways_and_end_with_it(tmp_path):
    async def run_hub(task_status):
        async with open_host(tmp_path, "hub", is_relay=True) as hub:
            with trio.CancelScope() as scope:
                task_status.started((hub, scope))
                await trio.sleep_forever()

    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b, trio.open_nursery() as nursery:
        hub, hub_scope = await nursery.start(run_hub)
        for end in (a, b):
            hub.admit(end.peer)
            end.admit(hub.peer)
            await end.connect(hub.addresses[0], 10)
        a.admit(b.peer)
        b.admit(a.peer)
        b.be_reachable_through(hub.addresses[0])
        circuit = b.addresses[-1]
        assert circuit.endswith(f"/p2p/{hub.peer}/p2p-circuit/p2p/{b.peer}")
        assert await a.connect(circuit, 20) == b.peer
        assert a.is_relayed(b.peer)
        assert b.is_relayed(a.peer)
        assert not a.is_relayed(hub.peer)
        for size in (10, 300_000):
            frame = secrets.token_bytes(size)
            for end, other in ((a, b), (b, a)):
                await end.send(PeerId(other.peer), frame)
                assert await received(other) == frame
        hub_scope.cancel()
        with trio.fail_after(10):
            while (await lost(a)).peer != b.peer:
                pass


async def test_a_relay_without_a_reservation_says_so(tmp_path):
    async with (
        open_host(tmp_path, "hub", is_relay=True) as hub,
        open_host(tmp_path, "a") as a,
        open_host(tmp_path, "b") as b,
    ):
        hub.admit(a.peer)
        hub.admit(b.peer)
        await b.connect(hub.addresses[0], 10)
        with pytest.raises(PeerTimeout) as raised:
            await a.connect(f"{hub.addresses[0]}{relay.CIRCUIT}/p2p/{b.peer}", 2)
        assert "reservation" in str(raised.value.__cause__)

"""One conformance suite over every transport; the emulated link's delays; the workarounds that libp2p needs."""

import random
import socket
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from dsd_p2p.errors import ConfigError, PeerDisconnected, PeerError, PeerTimeout
from dsd_p2p.netmodel import LinkModel, LinkState
from dsd_p2p.transport.base import Lost, Received
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.identity import load_or_create_seed
from dsd_p2p.transport.libp2p import open_libp2p
from dsd_p2p.transport.libp2p.sockets import raw_socket
from dsd_p2p.transport.memory import MemoryNetwork

PROTOCOL = "/dsd-test/1"
LOCALHOST = "/ip4/127.0.0.1/tcp/0"


def open_host(folder, name, listen=LOCALHOST, max_frame_bytes=1 << 22):
    return open_libp2p(identity=folder / name, listen=listen, protocol=PROTOCOL, max_frame_bytes=max_frame_bytes)


@pytest.fixture(params=["memory", "libp2p", "emulated-memory", "emulated-libp2p"])
def open_pair(request, tmp_path):
    """Return a context manager that yields two transports that can reach each other."""
    base = request.param.removeprefix("emulated-")
    link = LinkModel(latency_s=0.005, jitter_s=0.004) if "emulated" in request.param else LinkModel()

    @asynccontextmanager
    async def pair():
        async with AsyncExitStack() as stack:
            network = MemoryNetwork()
            ends = []
            for name in ("a", "b"):
                manager = network.open(name) if base == "memory" else open_host(tmp_path, name)
                inner = await stack.enter_async_context(manager)
                ends.append(await stack.enter_async_context(emulate(inner, link, random.Random(1))))
            for end, other in (ends, reversed(ends)):
                end.admit(other.peer)
            with trio.fail_after(60):
                yield ends

    return pair


async def received(transport):
    while True:
        event = await transport.receive()
        if isinstance(event, Received):
            return event


async def lost(transport):
    while True:
        event = await transport.receive()
        if isinstance(event, Lost):
            return event


async def test_frames_arrive_whole_and_in_order_both_ways(open_pair):
    async with open_pair() as (a, b):
        peer = await a.connect(b.addresses[0], 10)
        assert peer == b.peer
        frames = [bytes([i]) * size for i, size in enumerate((1, 5, 70_000, 3, 1_000_000, 0, 9))]

        async def send_all(source, target):
            for frame in frames:
                await source.send(target.peer, frame)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, a, b)
            nursery.start_soon(send_all, b, a)
            for end, sender in ((a, b), (b, a)):
                events = [await received(end) for _ in frames]
                assert [event.frame for event in events] == frames
                assert {event.sender for event in events} == {sender.peer}


async def test_a_peer_that_leaves_is_lost_and_cannot_be_sent_to(open_pair):
    async with open_pair() as (a, b):
        await a.connect(b.addresses[0], 10)
        await a.send(b.peer, b"hello")
        await received(b)
        await b.disconnect(a.peer, "enough")
        assert (await lost(a)).peer == b.peer
        with pytest.raises(PeerError):
            for _ in range(50):
                await a.send(b.peer, b"anybody?")
                await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_lost_peer_can_be_connected_again(open_pair):
    async with open_pair() as (a, b):
        await a.connect(b.addresses[0], 10)
        await a.disconnect(b.peer, "again")
        await lost(a)
        await a.connect(b.addresses[0], 10)
        await a.send(b.peer, b"again")
        assert (await received(b)).frame == b"again"


async def test_nothing_is_sent_over_a_new_connection_before_the_loss_of_the_old_one_is_read(tmp_path):
    """It would be meant for the old one: the peer, which has not been greeted again, would refuse it."""
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        with trio.fail_after(30):
            await a.connect(b.addresses[0], 5)
            a.admit(b.peer)
            b.admit(a.peer)
            await a.send(b.peer, b"one")
            await received(b)
            await b.disconnect(a.peer, "for the test")
            assert (await lost(a)).peer == b.peer
            await a.connect(b.addresses[0], 5)
            await a.send(b.peer, b"two")
            while a.peer not in b._inbound:  # noqa: ASYNC110 - of the host's own
                await trio.sleep(0.01)
            with pytest.raises(PeerDisconnected, match="not connected"):
                await b.send(a.peer, b"for the old connection")
            assert (await lost(b)).peer == a.peer
            await b.send(a.peer, b"three")
            assert (await received(a)).frame == b"three"


async def test_sending_to_a_stranger_is_an_error(open_pair):
    async with open_pair() as (a, b):
        with pytest.raises(PeerDisconnected):
            await a.send(b.peer, b"we never met")
            await trio.testing.wait_all_tasks_blocked(0.05)
            raise PeerDisconnected("an emulated link finds out later")


async def test_nobody_home_is_a_timeout_that_says_what_to_do(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        with pytest.raises(PeerTimeout, match="running and reachable"):
            await a.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{b.peer}", 0.5)
    async with MemoryNetwork().open("a") as a:
        with pytest.raises(PeerTimeout):
            await a.connect("memory:nobody", 0.05)


async def test_a_peer_that_starts_late_is_waited_for(tmp_path):
    """The negative cache of failed dials must not get in the way."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
    async with open_host(tmp_path, "b") as b:
        peer = b.peer
    async with open_host(tmp_path, "a") as a, trio.open_nursery() as nursery:
        connected = trio.Event()

        async def connect():
            assert await a.connect(f"{listen}/p2p/{peer}", 20) == peer
            connected.set()

        nursery.start_soon(connect)
        await trio.sleep(0.3)  # several failed dials
        assert not connected.is_set()
        async with open_host(tmp_path, "b", listen):
            with trio.fail_after(20):
                await connected.wait()


async def test_a_wrong_peer_id_is_refused_at_once(tmp_path):
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b, open_host(tmp_path, "c") as c:
        address = b.addresses[0].replace(b.peer, c.peer)
        with pytest.raises(PeerDisconnected, match="another peer id"), trio.fail_after(10):
            await a.connect(address, 10)


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/xyz"])
async def test_an_unreadable_address_names_the_form(tmp_path, address):
    async with open_host(tmp_path, "a") as a:
        with pytest.raises(ConfigError, match="/ip4/HOST/tcp/PORT/p2p/PEER"):
            await a.connect(address, 1)


async def test_a_port_in_use_is_an_error(tmp_path):
    """libp2p alone would bind it too, or silently listen on nothing."""
    async with open_host(tmp_path, "a") as a:
        listen = a.addresses[0].partition("/p2p/")[0]
        with pytest.raises(ConfigError, match="choose another with --listen"):
            async with open_host(tmp_path, "b", listen):
                pass


async def test_leaving_closes_the_sockets(tmp_path):
    """libp2p alone would keep them open until the event loop ends."""
    async with open_host(tmp_path, "a") as a:
        async with open_host(tmp_path, "b") as b:
            listen = b.addresses[0].partition("/p2p/")[0]
            await a.connect(b.addresses[0], 10)
        with trio.fail_after(10):
            assert (await lost(a)).peer == b.peer
        async with open_host(tmp_path, "c", listen):
            pass


async def test_an_identity_survives_a_restart_and_is_private(tmp_path):
    async with open_host(tmp_path, "a") as a:
        first = a.peer
    async with open_host(tmp_path, "a") as a:
        assert a.peer == first
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    (tmp_path / "a").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create_seed(tmp_path / "a")
    (tmp_path / "short").touch(0o600)
    with pytest.raises(ConfigError, match="expected 32 bytes, got 0"):
        load_or_create_seed(tmp_path / "short")


async def test_junk_on_a_fresh_stream_does_not_end_the_host(tmp_path):
    """Four bytes that are no protocol name raise inside libp2p's handler, which would take the host down."""
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        await a.connect(b.addresses[0], 10)
        for junk in (b"\x04\xff\xfe\xfd\n", b"\xff" * 64, b"\x00"):
            muxed = await a._host.get_network().get_connections()[0].muxed_conn.open_stream()
            await muxed.write(junk)
        await a.send(b.peer, b"still there")
        assert (await received(b)).frame == b"still there"


async def test_a_peer_that_answers_negotiation_with_junk_fails_one_connection(tmp_path):
    """libp2p decodes the answer as UTF-8 and raises from new_stream; the host and its other peers go on."""
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b, open_host(tmp_path, "c") as c:

        async def junk(stream):
            await stream.write(b"\x04\xff\xfe\xfd\n")
            await stream.read(1)

        b._host.get_network().set_stream_handler(junk)
        with pytest.raises(PeerError):
            await a.connect(b.addresses[0], 2)
        await a.connect(c.addresses[0], 10)
        await a.send(c.peer, b"still there")
        assert (await received(c)).frame == b"still there"


async def test_a_frame_above_the_limit_drops_the_sender(tmp_path):
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b", max_frame_bytes=1000) as b:
        b.admit(a.peer)
        await a.connect(b.addresses[0], 10)
        await a.send(b.peer, bytes(1001))
        with trio.fail_after(10):
            event = await lost(b)
        assert "1001 bytes" in event.reason


async def test_a_consumer_that_takes_nothing_does_not_stall_the_wire(tmp_path):
    """The reader drains: 24 MB wait in our queue, where libp2p's own window would have reset the stream after 5 s."""
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        b.admit(a.peer)
        await a.connect(b.addresses[0], 10)
        frame = bytes(1 << 20)
        with trio.fail_after(60):
            for _ in range(24):
                await a.send(b.peer, frame)
            await trio.sleep(6)
            for _ in range(24):
                assert len((await received(b)).frame) == len(frame)


async def test_sockets_use_cubic_and_no_delay(tmp_path):
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        await a.connect(b.addresses[0], 10)
        await a.send(b.peer, b"x")
        await received(b)
        raw = raw_socket(a._links[b.peer].stream)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        name = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        assert name == b"cubic"


async def test_one_stream_a_direction_for_the_life_of_a_connection(tmp_path):
    opened = []
    async with open_host(tmp_path, "a") as a, open_host(tmp_path, "b") as b:
        new_stream = a._host.new_stream

        async def counting(*arguments):
            opened.append(arguments)
            return await new_stream(*arguments)

        a._host.new_stream = counting
        await a.connect(b.addresses[0], 10)
        for index in range(200):
            await a.send(b.peer, bytes([index]))
            await received(b)
        assert [protocols for _, protocols in opened if protocols == [PROTOCOL]] == [[PROTOCOL]]


async def test_an_emulated_link_delays_by_its_latency(autojump_clock):
    network = MemoryNetwork()
    async with network.open("a") as a, network.open("b") as b:
        link = LinkModel(latency_s=0.05, bandwidth_bps=1e6)
        async with emulate(a, link, random.Random(0)) as slow:
            await slow.connect("memory:b", 1)
            start_s = trio.current_time()
            await slow.send(b.peer, bytes(1250))
            await slow.send(b.peer, bytes(1250))
            arrivals = []
            for _ in range(2):
                await received(b)
                arrivals.append(trio.current_time() - start_s)
            # 1250 bytes take 10 ms at 1 Mbit/s; the second waits for the first.
            assert arrivals == pytest.approx([0.06, 0.07], abs=1e-6)


@given(
    sizes=st.lists(st.integers(0, 10_000), min_size=1, max_size=30),
    gaps=st.lists(st.floats(0, 0.1), min_size=30, max_size=30),
    seed=st.integers(0, 1000),
)
def test_a_link_keeps_order_latency_and_bandwidth(sizes, gaps, seed):
    model = LinkModel(latency_s=0.02, jitter_s=0.01, bandwidth_bps=1e6)
    link, rng, now_s = LinkState(model), random.Random(seed), 0.0
    arrivals = []
    for size, gap in zip(sizes, gaps, strict=False):
        now_s += gap
        arrival_s = link.send(now_s=now_s, num_bytes=size, rng=rng)
        assert arrival_s >= now_s + 0.01 + size * 8 / 1e6 - 1e-12
        arrivals.append(arrival_s)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] >= sum(sizes) * 8 / 1e6


async def test_addresses_of_ipv6_and_of_names_connect(tmp_path):
    options = {"protocol": "/test/1", "max_frame_bytes": 1 << 20}
    async with (
        open_libp2p(identity=tmp_path / "a", listen="/ip6/::1/tcp/0", **options) as six,
        open_libp2p(identity=tmp_path / "b", listen="/ip4/127.0.0.1/tcp/0", **options) as four,
    ):
        assert await four.connect(six.addresses[0], 5) == six.peer
        named = four.addresses[0].replace("/ip4/127.0.0.1/", "/dns4/localhost/")
        assert await six.connect(named, 5) == four.peer
        await four.send(six.peer, b"hello")
        assert await six.receive() == Received(sender=four.peer, frame=b"hello")

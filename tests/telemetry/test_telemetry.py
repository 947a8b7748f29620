"""Events, the picture they add up to, and brokers: real ones, dead ones, and such that never answer."""

import gc
import json
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from toy import plain_text
from toy_drafts import TREE
from toy_swarm import PROMPT, toy_swarm

from dsd_p2p.errors import ConfigError
from dsd_p2p.telemetry.events import (
    DecisionMade,
    PeerStatus,
    Replayed,
    SessionEnded,
    SessionStarted,
    StageOf,
    WindowVerified,
    decode_event,
    encode_event,
)
from dsd_p2p.telemetry.mqtt import MqttPublisher, MqttSubscriber, parse_broker
from dsd_p2p.telemetry.picture import Picture
from dsd_p2p.telemetry.summary import describe
from dsd_p2p.window.learned.features import NAMES

# paho leaves the socket of a connection that did not come about to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect():
    """So that it is found here, and not in another test."""
    yield
    gc.collect()


MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def window(at_s: float, num_tokens: int, **fields: object) -> WindowVerified:
    return WindowVerified(at_s=at_s, session="s", coordinator="c", num_tokens=num_tokens, **fields)


def test_lost_events_cost_detail_and_no_sum():
    every, few = Picture(), Picture()
    events = [SessionStarted(at_s=0.0, session="s", coordinator="c", max_tokens=100)]
    events += [
        window(0.1 * n, 2 * n, num_misses=n // 3, hits_by_depth=(n, n // 2), outcomes_by_depth=(n, n))
        for n in range(1, 50)
    ]
    events.append(SessionEnded(at_s=5.0, session="s", coordinator="c", num_tokens=100))
    for index, event in enumerate(events):
        every.add(event)
        if index % 7 == 0 or index >= len(events) - 2:
            few.add(event)
    assert few.totals == every.totals
    assert few.acceptance() == every.acceptance() == [1.0, 24 / 49]
    assert sum(few.series) == sum(every.series) == 100


def test_what_is_wrong_is_told_the_worst_first():
    picture = Picture()
    picture.add(PeerStatus(at_s=100.0, peer="alive", queue=99))
    picture.add(PeerStatus(at_s=100.0, peer="gone", is_online=False))
    picture.add(PeerStatus(at_s=90.0, peer="silent"))
    picture.heard_at_s["silent"] = 90.0
    picture.add(Replayed(at_s=100.0, session="s", coordinator="c"))
    picture.tick(101.0)
    alerts = picture.alerts()
    assert [alert.level for alert in alerts] == sorted((a.level for a in alerts), reverse=True)
    texts = " ".join(alert.text for alert in alerts)
    for words in ("gone is offline", "silent has sent no status", "99 windows", "route(s) lost"):
        assert words in texts
    json.dumps(describe(picture))


EVENTS = st.one_of(
    st.builds(PeerStatus, at_s=st.floats(0, 1e9), peer=st.text(max_size=20), queue=st.integers(0, 1 << 40)),
    st.builds(SessionStarted, at_s=st.floats(0, 1e9), session=st.text(max_size=8), coordinator=st.text(max_size=8)),
    st.builds(
        WindowVerified,
        at_s=st.floats(0, 1e9),
        session=st.text(max_size=8),
        num_tokens=st.integers(0, 1 << 40),
        hits_by_depth=st.lists(st.integers(0, 99), max_size=9).map(tuple),
        outcomes_by_depth=st.lists(st.integers(0, 99), max_size=9).map(tuple),
    ),
    st.builds(DecisionMade, at_s=st.floats(0, 1e9), decision=st.text(max_size=8), features=st.just((0.5,) * 9)),
    st.builds(Replayed, at_s=st.floats(0, 1e9), session=st.text(max_size=8)),
    st.builds(SessionEnded, at_s=st.floats(0, 1e9), session=st.text(max_size=8), error=st.text(max_size=20)),
)


@given(st.lists(EVENTS, max_size=40))
def test_any_events_in_any_order_make_a_picture(events):
    picture = Picture()
    for event in events:
        assert decode_event(encode_event(event)) == event
        picture.add(event)
        picture.tick(picture.now_s + 1)
        picture.alerts()
    json.dumps(describe(picture))


def test_a_time_that_is_none_is_no_event_and_a_pause_of_years_costs_nothing():
    assert decode_event(b'{"event":{"type":"peer","at_s":1e17},"schema":1}') is None
    assert decode_event(b'{"event":{"type":"peer","at_s":-1},"schema":1}') is None
    picture = Picture()
    for at_s in (0.0, 1.0, 9e10, 1e11):
        picture.add(PeerStatus(at_s=at_s, peer="p"))
    assert len(picture.series) <= 120


def test_the_speed_is_that_of_the_last_seconds_also_for_who_comes_late():
    early, late = Picture(), Picture()
    early.add(SessionStarted(at_s=0.0, session="s", coordinator="c"))
    for tenth in range(1, 400):
        event = window(tenth / 10, tenth)
        early.add(event)
        if tenth > 300:
            late.add(event)
    for picture in (early, late):
        assert picture.tokens_per_s == pytest.approx(10, abs=0.5)
        assert picture.sessions["s"].tokens_per_s(picture.now_s) == pytest.approx(10, abs=0.5)
        picture.tick(picture.now_s + 400)
        assert picture.sessions == {}, "a coordinator that is gone takes its requests along"


@given(st.binary(max_size=80))
def test_what_is_no_event_is_none(data):
    assert decode_event(data) is None


def test_an_event_of_a_newer_writer_is_read_and_of_another_schema_is_not():
    newer = json.loads(encode_event(PeerStatus(peer="p")))
    newer["event"]["colour"] = "blue"
    assert decode_event(json.dumps(newer).encode()) == PeerStatus(peer="p")
    assert decode_event(b'{"event":{"type":"peer"},"schema":1}') == PeerStatus()
    newer["schema"] = 2
    assert decode_event(json.dumps(newer).encode()) is None
    assert decode_event(b'{"event":{"type":"rumour"},"schema":1}') is None


async def test_a_live_request_tells_its_story():
    events = []
    async with toy_swarm() as swarm:
        swarm.engine.tell = events.append
        tokens, _ = await swarm.write(PROMPT, 40, TREE)
        assert tokens == plain_text(PROMPT, 40)
    started, *windows, ended = [event for event in events if not isinstance(event, DecisionMade)]
    decisions = [event for event in events if isinstance(event, DecisionMade)]
    assert {event.decision for event in decisions} == {TREE.kind}, "it never changes its mind"
    assert all(len(event.features) == len(NAMES) for event in decisions)
    assert sum(rate.num_tokens for rate in decisions[-1].measured) > 30
    assert isinstance(started, SessionStarted)
    assert [stage.peer for stage in started.stages] == ["stage0", "stage1", "stage2"]
    assert (started.num_prompt_tokens, started.max_tokens) == (len(PROMPT), 40)
    assert windows
    assert all(isinstance(event, WindowVerified) for event in windows)
    assert isinstance(ended, SessionEnded)
    assert (ended.reason, ended.error, ended.num_tokens) == ("length", "", 40)


async def test_a_lost_chain_is_a_failover_and_a_failure_has_its_reason():
    events = []
    told = trio.Event()

    def tell(event: object) -> None:
        events.append(event)
        if len(events) == 2:
            told.set()

    async with toy_swarm() as swarm:
        swarm.engine.tell = tell

        async def cut() -> None:
            await told.wait()
            for peer in list(swarm.engine.links.connected):
                if peer == "stage1":
                    await swarm.engine.links.transport.disconnect(peer, "test")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            tokens, _ = await swarm.write(PROMPT, 300, TREE)
        assert tokens == plain_text(PROMPT, 300)
    assert [type(event).__name__ for event in events].count("Replayed") >= 1
    assert events[-1].num_replays >= 1


@pytest.mark.parametrize(
    "url", ["http://x", "mqtt://", "mqtt://host:notaport", "mqtt://host/path", "mqtt://host:99999", "garbage"]
)
def test_a_broker_that_is_none_is_named(url):
    with pytest.raises(ConfigError, match="broker"):
        parse_broker(url, swarm="s")


# Brokers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def mosquitto(folder, text: str):
    config = folder / "mosquitto.conf"
    config.write_text(text)
    process = subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="no mosquitto: apt-get install mosquitto")


@needs_mosquitto
def test_events_go_through_a_broker_that_dies_and_comes_back(tmp_path):
    port = free_port()
    config = f"listener {port} 127.0.0.1\nallow_anonymous true\n"
    broker = parse_broker(f"mqtt://127.0.0.1:{port}", swarm="test")
    heard: list[object] = []
    publisher, subscriber = MqttPublisher(broker, "me"), MqttSubscriber(broker, heard.append)
    publisher.start()
    subscriber.start()
    try:
        with mosquitto(tmp_path, config):
            wait_for(lambda: publisher.is_connected and subscriber.is_connected)
            publisher.tell(PeerStatus(peer="me", state="first"))
            publisher.tell(SessionStarted(session="s", coordinator="me", stages=(StageOf(peer="x", last=3),)))
            wait_for(lambda: len(heard) >= 2)
        # A node tells its status every second, and so notices.
        publisher.tell(PeerStatus(peer="me", state="unheard"))
        wait_for(lambda: not publisher.is_connected, 40)
        start_s = time.perf_counter()
        for number in range(6000):
            publisher.tell(window(0.0, number))
        # Telling never waits, and what has no room is counted.
        assert time.perf_counter() - start_s < 2
        assert publisher.num_dropped >= 6000 - 4096
        with mosquitto(tmp_path, config):
            wait_for(lambda: publisher.is_connected and subscriber.is_connected, 40)

            def is_heard() -> bool:
                # A node tells its status again and again: one that finds the queue full is dropped.
                publisher.tell(PeerStatus(peer="me", state="again"))
                return any(getattr(event, "state", "") == "again" for event in heard)

            wait_for(is_heard)
    finally:
        publisher.close()
        subscriber.close()


@needs_mosquitto
def test_the_last_will_says_offline_when_a_node_vanishes(tmp_path):
    port = free_port()
    broker = parse_broker(f"mqtt://127.0.0.1:{port}", swarm="test")
    heard: list[PeerStatus] = []
    subscriber = MqttSubscriber(broker, heard.append)
    code = (
        "import sys, time\nfrom dsd_p2p.telemetry.mqtt import *\nfrom dsd_p2p.telemetry.events import PeerStatus\n"
        f"p = MqttPublisher(parse_broker('mqtt://127.0.0.1:{port}', swarm='test'), 'victim')\n"
        "p.start()\np.tell(PeerStatus(peer='victim'))\ntime.sleep(60)\n"
    )
    with mosquitto(tmp_path, f"listener {port} 127.0.0.1\nallow_anonymous true\n"):
        subscriber.start()
        import sys

        victim = subprocess.Popen([sys.executable, "-c", code])
        try:
            wait_for(lambda: any(event.is_online for event in heard))
            victim.kill()
            wait_for(lambda: not heard[-1].is_online, 30)
        finally:
            victim.kill()
            victim.wait(5)
            subscriber.close()


@needs_mosquitto
def test_over_tls_with_passwords_a_node_writes_its_own_topics_only(tmp_path):
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=tmp_path)

    openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-days",
        "2",
        "-subj",
        "/CN=ca",
    )
    openssl(
        "req", "-newkey", "rsa:2048", "-nodes", "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1"
    )
    (tmp_path / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "server.pem", "-days", "2", "-extfile", "ext"),
    )
    for user in ("alice", "mallory", "watcher"):
        flags = ["-b"] if (tmp_path / "passwords").exists() else ["-c", "-b"]
        subprocess.run(["mosquitto_passwd", *flags, str(tmp_path / "passwords"), user, f"{user}-secret"], check=True)
    (tmp_path / "acl").write_text("pattern write dsd/v1/+/peers/%u/#\nuser watcher\ntopic read dsd/v1/#\n")
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    tmp_path.chmod(0o755)
    port = free_port()
    config = (
        f"listener {port} 127.0.0.1\ncafile {tmp_path}/ca.pem\ncertfile {tmp_path}/server.pem\n"
        f"keyfile {tmp_path}/server.key\nallow_anonymous false\npassword_file {tmp_path}/passwords\n"
        f"acl_file {tmp_path}/acl\nuser root\n"
    )
    ca_file = str(tmp_path / "ca.pem")

    def broker(user: str):
        return parse_broker(f"mqtts://{user}:{user}-secret@127.0.0.1:{port}", swarm="test", ca_file=ca_file)

    heard: list[PeerStatus] = []
    subscriber = MqttSubscriber(broker("watcher"), heard.append)
    honest, forger = MqttPublisher(broker("alice"), "alice"), MqttPublisher(broker("mallory"), "alice")
    stranger = MqttPublisher(
        parse_broker(f"mqtts://alice:wrong@127.0.0.1:{port}", swarm="test", ca_file=ca_file), "alice"
    )
    unverified = MqttPublisher(parse_broker(f"mqtts://alice:alice-secret@127.0.0.1:{port}", swarm="test"), "alice")
    clients = [subscriber, honest, forger, stranger, unverified]
    with mosquitto(tmp_path, config):
        try:
            for client in clients:
                client.start()
            wait_for(lambda: subscriber.is_connected and honest.is_connected and forger.is_connected)
            forger.tell(PeerStatus(peer="alice", state="forged"))
            stranger.tell(PeerStatus(peer="alice", state="forged"))
            unverified.tell(PeerStatus(peer="alice", state="forged"))
            # Below her own topics the broker lets her write: she is not believed there either.
            below = parse_broker(f"mqtts://mallory:mallory-secret@127.0.0.1:{port}", swarm="x", ca_file=ca_file)
            nested = MqttPublisher(replace(below, topics="dsd/v1/test/peers/mallory"), "alice")
            nested._topics = "dsd/v1/test/peers/mallory/x"
            clients.append(nested)
            nested.start()
            nested.tell(PeerStatus(peer="alice", state="forged"))
            time.sleep(1.0)
            honest.tell(PeerStatus(peer="alice", state="true"))
            wait_for(lambda: any(event.state == "true" for event in heard))
            assert not any(event.state == "forged" for event in heard)
            assert not stranger.is_connected
            assert not unverified.is_connected
        finally:
            for client in clients:
                client.close()


def test_a_broker_that_accepts_and_never_answers_holds_nobody_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        publisher = MqttPublisher(parse_broker(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", swarm="s"), "me")
        publisher.start()
        start_s = time.perf_counter()
        for number in range(10_000):
            publisher.tell(window(0.0, number))
        assert time.perf_counter() - start_s < 2
        assert publisher.num_dropped >= 10_000 - 4096
        assert not publisher.is_connected
        start_s = time.perf_counter()
        publisher.close()
        assert time.perf_counter() - start_s < 10
    assert threading.active_count() < 50


def test_the_picture_names_who_drafts_now():
    picture = Picture()
    picture.add(SessionStarted(at_s=0.0, session="s", coordinator="c", drafter="ngram"))
    picture.add(window(0.1, 1))
    assert picture.sessions["s"].drafter == "ngram"
    picture.add(window(0.2, 2, drafter="shadow of near"))
    assert picture.sessions["s"].drafter == "shadow of near"


@pytest.mark.parametrize("url", ["mqtt://me:secret@host:99999", "mqtt://me:secret@", "http://me:secret@host"])
def test_an_error_about_a_broker_does_not_show_its_password(url):
    with pytest.raises(ConfigError) as caught:
        parse_broker(url, swarm="s")
    assert "secret" not in str(caught.value)

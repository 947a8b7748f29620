"""A live swarm of toy stages: who sends what to whom, what is refused, what is freed, what is survived."""

import gc
import logging
import random
import threading
import tracemalloc
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from demand import IS_ALL
from msgspec.structs import replace
from swarms import TEST_MODEL, memory_swarm, signed
from toy import VOCAB, plain_text
from toy_drafts import TREE, drafter
from toy_model import ROW, ToyDrafter, ToySpanModel
from toy_swarm import NUM_STAGES, PROMPT, SPANS, TappedNetwork, toy_swarm, toys

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.errors import CapacityError, ConfigError, ModelError, PeerError, RemoteProtocolError
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.transport.base import Lost, Received
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import (
    ComputeFormat,
    Constraint,
    ConstraintKind,
    Endpoint,
    PeerInfo,
    Sampling,
    StageCost,
    TextRequest,
)
from dsd_p2p.window.static import PLAIN, StaticPolicy, sync_chain
from dsd_p2p.wire.codec import decode, encode
from dsd_p2p.wire.messages import (
    Cancel,
    CloseSession,
    Failure,
    Hello,
    Hop,
    OpenSession,
    Ping,
    Pong,
    Verdict,
    Window,
)
from dsd_p2p.wire.opening import signed_opening
from dsd_p2p.wire.version import PROTOCOL_VERSION


@pytest.mark.parametrize("is_instant", [True, False])
@pytest.mark.parametrize("decision", [PLAIN, sync_chain(4), TREE], ids=["plain", "sync", "tree"])
async def test_who_sends_what_to_whom(decision, is_instant):
    network = TappedNetwork()
    async with toy_swarm(network=network, is_instant=is_instant, link=LinkModel(latency_s=0.002)) as swarm:
        tokens, generation = await swarm.write(PROMPT, 40, decision)
        assert tokens == plain_text(PROMPT, 40)
        await swarm.all_closed()
    windows = [(source, to, size) for source, to, message, size in network.log if isinstance(message, Window)]
    # Hidden states go from stage to stage, never through the coordinator; tokens go to the head without any.
    assert {(source, to) for source, to, _ in windows} == {
        ("coordinator", "stage0"),
        ("stage0", "stage1"),
        ("stage1", "stage2"),
    }
    assert all((size == 0) == (source == "coordinator") for source, _, size in windows)
    # Verdicts come straight back, and nothing but small messages ever does: no logits cross a link.
    verdicts = [(source, to) for source, to, message, _ in network.log if isinstance(message, Verdict)]
    assert set(verdicts) == {("stage2", "coordinator")}
    sizes = [len(encode(message)) for _, to, message, _ in network.log if to == "coordinator"]
    assert max(sizes) < 400
    payloads = {len(m.tokens) * ROW.size == size for _, _, m, size in network.log if isinstance(m, Window) and size}
    assert payloads == {True}
    closes = [to for source, to, message, _ in network.log if isinstance(message, CloseSession)]
    assert sorted(closes) == ["stage0", "stage1", "stage2"]
    assert generation.finish is not None
    if decision is TREE:
        assert generation.stats.max_windows_in_flight > 1, "windows overlap"


@pytest.mark.parametrize(("decision", "is_overlapping"), [(PLAIN, False), (sync_chain(4), False), (TREE, True)])
async def test_windows_leave_before_the_first_verdict_is_sent(decision, is_overlapping):
    network = TappedNetwork()
    async with toy_swarm(accuracy=1.0, network=network, link=LinkModel(latency_s=0.02)) as swarm:
        await swarm.write(PROMPT, 30, decision)
    kinds = [type(message) for source, _, message, _ in network.log if source in ("coordinator", "stage2")]
    num_before = kinds[: kinds.index(Verdict)].count(Window)
    assert (num_before > 2) == is_overlapping, "the prompt, its last token, and what was drafted meanwhile"


async def test_a_seeded_text_is_the_same_through_live_stages():
    texts = []
    for decision in (PLAIN, sync_chain(3), TREE):
        async with toy_swarm() as swarm:
            tokens, _ = await swarm.write(PROMPT, 30, decision, Sampling(temperature=1.0, seed=3))
            texts.append(tokens)
    assert texts[0] == texts[1] == texts[2] != plain_text(PROMPT, 30)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        ({"stages": "full"}, CapacityError, "raise --cache-memory"),
        (
            {"limits": StageLimits(sessions=Scopes(what="sessions", node=0, root=1, peer=1))},
            CapacityError,
            "try again later",
        ),
    ],
)
async def test_a_refusal_reaches_the_user_with_its_kind(spoil, error, words):
    if spoil.get("stages") == "full":
        spoil = {"stages": [*toys()[:2], ToySpanModel(SPANS[2], NUM_STAGES, max_caches=0)]}
    async with toy_swarm(**spoil) as swarm:
        with pytest.raises(error, match=words):
            await swarm.write(PROMPT, 10, PLAIN)
        await swarm.all_closed()


LIE = replace(TEST_MODEL, digest="lie")


async def test_stages_of_different_weights_share_no_route():
    """A 4-bit copy of one checkpoint is another model, too."""
    async with toy_swarm() as swarm:
        info = swarm.engine.links.known["stage1"]
        swarm.engine.links.known["stage1"] = replace(info, model=replace(TEST_MODEL, weights="q4_k"))
        with pytest.raises(ConfigError, match="the stages serve different models"):
            await swarm.write(PROMPT, 10, PLAIN)
        # One that claims the right model to the coordinator and holds another is caught by the stage itself.
        for i in range(3):
            lie = {"peer": f"stage{i}", "span": SPANS[i], "addresses": (f"memory:stage{i}",), "model": LIE}
            swarm.engine.links.known[f"stage{i}"] = replace(info, **lie)
        with pytest.raises(ModelError, match="start all peers with the same model"):
            await swarm.write(PROMPT, 10, PLAIN)


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "words"),
    [
        ([], 5, "prompt is empty"),
        ([1] * 1020, 5, "context of 1024"),
        ([VOCAB], 5, "vocabulary of 7"),
        ([1], 0, "at least 1"),
    ],
)
async def test_what_cannot_be_asked(prompt, num_tokens, words):
    async with toy_swarm() as swarm:
        with pytest.raises(ConfigError, match=words):
            await swarm.write(prompt, num_tokens, PLAIN)


async def test_leaving_early_frees_every_stage():
    stages = toys()
    async with toy_swarm(stages=stages, link=LinkModel(latency_s=0.001)) as swarm:
        for _ in range(5):
            async with swarm.engine.generate(
                PROMPT, GenerateOptions(text=TextRequest(max_tokens=500)), StaticPolicy(TREE)
            ) as generation:
                async for _token in generation:
                    break
        await swarm.all_closed()
        assert [stage.num_caches for stage in stages] == [0, 0, 0]


@pytest.mark.parametrize("index", range(NUM_STAGES))
@pytest.mark.parametrize("decision", [PLAIN, TREE], ids=["plain", "tree"])
async def test_a_stage_that_loses_its_connections_is_reconnected_and_the_text_goes_on(index, decision):
    network = MemoryNetwork()
    stages = toys()
    drops = [12, 30]

    async with toy_swarm(stages=stages, network=network) as swarm, trio.open_nursery() as nursery:
        drop_now = trio.Event()

        def before_pass():
            if drops and stages[index].num_passes == drops[0]:
                drops.pop(0)
                trio.from_thread.run_sync(drop_now.set)

        stages[index].before_pass = before_pass

        async def drop():
            nonlocal drop_now
            while True:
                await drop_now.wait()
                drop_now = trio.Event()
                transport = network.transports[f"stage{index}"]
                for peer in list(transport.connected):
                    await transport.disconnect(peer, "cable pulled")

        nursery.start_soon(drop)
        tokens, generation = await swarm.write(PROMPT, 60, decision)
        assert tokens == plain_text(PROMPT, 60)
        assert generation.stats.num_replays >= 1
        assert not drops
        nursery.cancel_scope.cancel()


async def test_a_chain_that_falls_silent_ends_in_a_typed_error():
    async with toy_swarm() as swarm:
        transport = swarm.network.transports["coordinator"]
        original = transport.receive

        async def deaf_to_verdicts():
            while True:
                event = await original()
                if not (isinstance(event, Received) and isinstance(decode(event.frame).message, Verdict)):
                    return event

        transport.receive = deaf_to_verdicts
        options = GenerateOptions(text=TextRequest(max_tokens=20), stall_timeout_s=0.2)
        with pytest.raises(PeerError, match=r"no verdict for 0\.2 s"), trio.fail_after(60):
            async with swarm.engine.generate(PROMPT, options, StaticPolicy(PLAIN)) as generation:
                async for _ in generation:
                    pass
        assert generation.stats.num_replays == 3
        await swarm.all_closed()


# Hostile peers


@asynccontextmanager
async def stranger(network, name="mallory", *, says_hello=True):
    async with network.open(name) as transport:
        for index in range(NUM_STAGES):
            await transport.connect(f"memory:stage{index}", 1)
            if says_hello:
                hello = Hello(version=PROTOCOL_VERSION, sender=PeerInfo(peer=name, addresses=()))
                await transport.send(f"stage{index}", encode(hello))
        yield transport


def open_message(**changes):
    values = {
        "session": b"mallory!",
        "epoch": 0,
        "route": tuple(Hop(peer=f"stage{i}", address=f"memory:stage{i}", span=SPANS[i]) for i in range(3)),
        "coordinator": Endpoint("mallory", "memory:mallory"),
        "model": TEST_MODEL,
        "text": TextRequest(max_tokens=19),
        "num_prompt": 1,
        "num_given": 1,
        "idle_timeout_s": 1.0,
    }
    return signed(OpenSession(**{**values, **changes}))


def first_window(**changes):
    values = {
        "session": b"mallory!",
        "epoch": 0,
        "window": 0,
        "root": (0, -1),
        "first_node": 0,
        "tokens": (1,),
        "parents": (-1,),
        "positions": (0,),
    }
    return Window(**{**values, **changes})


async def answer(transport):
    """The stage's word on what we did: a failure, or being dropped."""
    with trio.fail_after(5):
        while True:
            event = await transport.receive()
            if isinstance(event, Lost):
                return event.reason
            message = decode(event.frame).message
            if isinstance(message, Failure):
                return message.text


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([Verdict(session=b"mallory!", epoch=0, window=0, start_pos=1, tokens=(1,), settled=(0,))], "message"),
        ([open_message(route=open_message().route[1:])], "route"),
        ([open_message(coordinator=Endpoint("honest"))], "sender"),
        ([open_message(model=replace(TEST_MODEL, digest="other"))], "same model"),
        ([open_message(model=replace(TEST_MODEL, weights="q4_k"))], "same model"),
        ([open_message(model=replace(TEST_MODEL, compute=ComputeFormat.BFLOAT16))], "same model"),
        ([open_message(text=TextRequest(max_tokens=5000))], "exceed the model's limit of 1024"),
        (
            [open_message(text=TextRequest(max_tokens=19, constraint=Constraint(ConstraintKind.REGEX, "[0-9]+")))],
            "cannot constrain answers",
        ),
        ([open_message(num_prompt=2)], "num_given"),
        ([open_message(), first_window(tokens=(99,))], "token"),
        ([open_message(), first_window(epoch=5)], "epoch"),
        ([open_message(), first_window(parents=(3,))], "parent"),
        ([open_message(), first_window(positions=(19,))], "position"),
        ([open_message(), open_message()], "epoch"),
        ([open_message(), (first_window(), b"12345678")], "payload"),
    ],
)
async def test_a_broken_rule_is_named(messages, words):
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm, stranger(network) as mallory:
        for message in messages:
            frame = encode(*message) if isinstance(message, tuple) else encode(message)
            await mallory.send("stage0", frame)
        assert words in await answer(mallory)
        tokens, _ = await swarm.write(PROMPT, 10, TREE)
        assert tokens == plain_text(PROMPT, 10)


@pytest.mark.parametrize("forge", ["unsigned", "its own signature", "another opening's signature"])
async def test_nobody_opens_a_session_in_anothers_name(forge):
    """As the stage before, a peer could take over a session whose id it knows, and fill its coordinator's quota."""
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm, stranger(network) as mallory:
        honest = open_message(coordinator=Endpoint("coordinator", "memory:coordinator"))
        before = Hop(peer="mallory", address="memory:mallory", span=SPANS[0])
        opened = replace(honest, route=(before, *honest.route[1:]), epoch=7)
        match forge:
            case "unsigned":
                opened = replace(opened, signature=b"")
            case "its own signature":
                opened = signed(opened, by="mallory")
        await mallory.send("stage1", encode(opened))
        assert "opening signature" in await answer(mallory)
        assert not any(server.num_sessions for server in swarm.servers)
        tokens, _ = await swarm.write(PROMPT, 10, TREE)
        assert tokens == plain_text(PROMPT, 10)


async def test_a_strangers_words_about_a_session_are_not_taken():
    """Windows, cancels, closes and verdicts count only from the peer whose business they are."""
    network = TappedNetwork()
    link = LinkModel(latency_s=0.002)
    async with (
        toy_swarm(network=network, link=link) as swarm,
        stranger(network) as mallory,
        trio.open_nursery() as nursery,
    ):
        num_refused, is_done = 0, trio.Event()

        async def meddle():
            nonlocal num_refused
            while sum(isinstance(message, Verdict) for _, _, message, _ in network.log) < 3:
                await trio.testing.wait_all_tasks_blocked(0.001)
            session = next(m.session for _, _, m, _ in network.log if isinstance(m, OpenSession))
            hello = encode(Hello(version=PROTOCOL_VERSION, sender=PeerInfo(peer="mallory", addresses=())))
            for message in (
                CloseSession(session=session, epoch=9),
                Cancel(session=session, epoch=9),
                # Ahead of the session's epoch, which every token raises: an old one is dropped without a word, whoever sends it.
                first_window(session=session, epoch=1_000_000, window=5000),
                Verdict(session=session, epoch=0, window=0, start_pos=5, tokens=(1,), settled=(-1,)),
            ):
                for index in range(NUM_STAGES):
                    await mallory.connect(f"memory:stage{index}", 1)
                    await mallory.send(f"stage{index}", hello)
                    await mallory.send(f"stage{index}", encode(message))
                    num_refused += ": expected " in await answer(mallory)
            is_done.set()

        nursery.start_soon(meddle)
        tokens = []
        async with swarm.engine.generate(
            PROMPT, GenerateOptions(text=TextRequest(max_tokens=1000)), StaticPolicy(PLAIN)
        ) as generation:
            async for token in generation:
                tokens.append(token)
                if is_done.is_set():
                    break
        assert tokens == plain_text(PROMPT, len(tokens))
        assert generation.stats.num_replays == 0
        assert num_refused == 12


async def test_nothing_is_heard_before_a_hello():
    network = MemoryNetwork()
    async with toy_swarm(network=network), stranger(network, says_hello=False) as mallory:
        await mallory.send("stage0", encode(open_message()))
        assert "Hello" in await answer(mallory)


async def test_a_peer_that_reads_no_answer_holds_up_nobody(autojump_clock):
    """A pong, or a refusal, to such a peer blocked the receive loop for up to a second."""
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm, stranger(network) as mallory, stranger(network, "honest") as honest:
        stage = network.transports["stage0"]
        original = stage.send

        async def send(to, frame):
            if to == "mallory":
                await trio.sleep_forever()
            await original(to, frame)

        stage.send = send
        for nonce in range(20):
            await mallory.send("stage0", encode(Ping(nonce=nonce)))
        await mallory.send("stage0", encode(open_message(coordinator=Endpoint("honest"))))
        await honest.send("stage0", encode(Ping(nonce=7)))
        start_s = trio.current_time()
        while True:
            event = await honest.receive()
            if not isinstance(event, Lost) and isinstance(decode(event.frame).message, Pong):
                break
        assert trio.current_time() - start_s < 0.1
        while "mallory" in swarm.servers[0].links.connected:  # noqa: ASYNC110 - a state of another peer
            await trio.sleep(0.1)


async def test_another_version_is_refused_by_name():
    network = MemoryNetwork()
    async with toy_swarm(network=network), stranger(network, says_hello=False) as mallory:
        frame = bytearray(encode(Ping(nonce=1)))
        frame[0] = PROTOCOL_VERSION + 1
        await mallory.send("stage0", bytes(frame))
        assert "protocol version: expected" in await answer(mallory)


async def test_a_session_nobody_feeds_is_closed(autojump_clock):
    network = MemoryNetwork()
    stages = toys()
    async with toy_swarm(network=network, stages=stages) as swarm, stranger(network) as mallory:
        await mallory.send("stage0", encode(open_message()))
        assert "received no window for 1 s" in await answer(mallory)
        await swarm.all_closed()
        assert [stage.num_caches for stage in stages] == [0, 0, 0]


async def test_a_session_without_a_first_window_frees_its_cache_soon(autojump_clock):
    """A session that only holds cache could do so for an hour."""
    network = MemoryNetwork()
    stages = toys()
    async with toy_swarm(network=network, stages=stages) as swarm, stranger(network) as mallory:
        await mallory.send("stage0", encode(open_message(idle_timeout_s=3600.0)))
        start_s = trio.current_time()
        said = set()
        while len(said) < 3:
            with trio.fail_after(200):
                event = await mallory.receive()
            message = decode(event.frame).message
            if isinstance(message, Failure):
                said.add(message.text)
        assert said == {f"the stage received no window for {seconds} s" for seconds in (30, 60, 90)}
        assert trio.current_time() - start_s < 100
        await swarm.all_closed()
        assert [stage.num_caches for stage in stages] == [0, 0, 0]


async def test_a_close_that_overtakes_its_open_wins():
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm, stranger(network) as mallory:
        await mallory.send("stage0", encode(CloseSession(session=b"mallory!", epoch=0)))
        await mallory.send("stage0", encode(open_message()))
        await mallory.send("stage0", encode(Ping(nonce=5)))
        while not isinstance(decode((await mallory.receive()).frame).message, Pong):
            pass
        assert swarm.servers[0].num_sessions == 0


async def test_a_late_close_of_an_earlier_epoch_does_not_end_the_reopened_session():
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm, stranger(network) as mallory:
        await mallory.send("stage0", encode(open_message(epoch=4)))
        await mallory.send("stage0", encode(CloseSession(session=b"mallory!", epoch=3)))
        await mallory.send("stage0", encode(Ping(nonce=5)))
        while not isinstance(decode((await mallory.receive()).frame).message, Pong):
            pass
        assert swarm.servers[0].num_sessions == 1


async def test_reopening_under_a_running_pass_waits_for_it():
    network = MemoryNetwork()
    stages = toys()
    running, go_on = threading.Event(), threading.Event()

    def before_pass():
        running.set()
        assert go_on.wait(10)

    stages[0].before_pass = before_pass
    async with toy_swarm(network=network, stages=stages) as swarm, stranger(network) as mallory:
        await mallory.send("stage0", encode(open_message()))
        await mallory.send("stage0", encode(first_window()))
        await trio.to_thread.run_sync(running.wait)
        await mallory.send("stage0", encode(open_message(epoch=1)))
        await mallory.send("stage0", encode(first_window(epoch=1, window=1, root=(1, -1))))
        await mallory.send("stage0", encode(Ping(nonce=5)))
        while not isinstance(decode((await mallory.receive()).frame).message, Pong):
            pass
        assert stages[0].num_caches == 1
        go_on.set()
        with trio.fail_after(10):
            while not isinstance(decode((await mallory.receive()).frame).message, Verdict):
                pass
        assert swarm.servers[0].num_sessions == 1


async def test_a_pass_that_raises_ends_its_session_and_not_the_daemon():
    network = MemoryNetwork()
    stages = toys()

    def before_pass():
        stages[0].before_pass = lambda: None
        raise RuntimeError("out of memory, says the device")

    async with toy_swarm(network=network, stages=stages) as swarm, stranger(network) as mallory:
        stages[0].before_pass = before_pass
        await mallory.send("stage0", encode(open_message()))
        await mallory.send("stage0", encode(first_window()))
        assert "failed: RuntimeError" in await answer(mallory)
        tokens, _ = await swarm.write(PROMPT, 10, TREE)
        assert tokens == plain_text(PROMPT, 10)


@pytest.mark.parametrize("is_instant", [True, False])
async def test_a_drafter_that_raises_costs_speed_and_not_the_answer(is_instant):
    calls = []

    def drafts(text, width):
        calls.append(text)
        if len(calls) > 3:
            raise RuntimeError("drafter broke")
        return drafter(1.0, random.Random(0))(text, width)

    async with memory_swarm(
        toys(), ToyDrafter(drafts, is_instant=is_instant), vocab_size=VOCAB, num_layers=NUM_STAGES, spans=SPANS
    ) as swarm:
        tokens, _ = await swarm.write(PROMPT, 30, TREE)
        assert tokens == plain_text(PROMPT, 30)
        assert len(calls) == 4, "not asked again"


async def test_a_relay_is_not_blamed_for_what_it_was_given():
    """Measurements before the head and a route that names a peer twice are stopped where they enter."""
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm:
        for messages in (
            [open_message(), first_window(link_bytes=1 << 62)],
            [open_message(), first_window(waited=1)],
            [open_message(), first_window(costs=(StageCost(us=1, num_rows=1),) * 64)],
            [open_message(route=(*open_message().route[:2], open_message().route[1]))],
        ):
            async with stranger(network) as mallory:
                for message in messages:
                    await mallory.send("stage0", encode(message))
                assert ": expected " in await answer(mallory)
        assert "stage1" in network.transports["stage0"].connected or swarm.servers[0].num_sessions == 0
        tokens, generation = await swarm.write(PROMPT, 20, TREE)
        assert tokens == plain_text(PROMPT, 20)
        assert generation.stats.num_replays == 0


async def test_a_route_names_the_addresses_that_worked_for_the_coordinator():
    network = TappedNetwork()
    async with toy_swarm(network=network) as swarm:
        for index in range(NUM_STAGES):
            info = swarm.engine.links.known[f"stage{index}"]
            swarm.engine.links.known[f"stage{index}"] = replace(info, addresses=("memory:its-loopback",))
        await swarm.write(PROMPT, 5, PLAIN)
    opened = next(message for _, _, message, _ in network.log if isinstance(message, OpenSession))
    assert [hop.address for hop in opened.route] == [f"memory:stage{index}" for index in range(NUM_STAGES)]


async def test_clients_that_left_are_forgotten_and_not_passed_on():
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm:
        for index in range(5):
            async with stranger(network, f"client{index}"):
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        async with stranger(network, "late") as late:
            with trio.fail_after(5):
                while not isinstance(message := decode((await late.receive()).frame).message, Hello):
                    pass
        assert not any("client" in info.peer for info in message.known)
        assert not any("client" in peer for peer in swarm.engine.links.known)


def mutations(rng):
    """Frames that are random, cut, spliced, bit-flipped, or well formed and wrong."""
    honest = [
        encode(open_message()),
        encode(first_window()),
        encode(first_window(tokens=(1, 2), parents=(-1, 0), positions=(0, 1)), bytes(16)),
        encode(Cancel(session=b"mallory!", epoch=3)),
        encode(CloseSession(session=b"mallory!", epoch=0)),
        encode(Failure(session=b"mallory!", epoch=0, kind="model", text="x")),
        encode(Verdict(session=b"mallory!", epoch=0, window=0, start_pos=1, tokens=(1,), settled=(0,))),
        encode(Hello(version=PROTOCOL_VERSION, sender=PeerInfo(peer="mallory", addresses=()))),
        encode(Ping(nonce=1)),
    ]
    while True:
        frame = bytearray(rng.choice(honest))
        match rng.randrange(6):
            case 0:
                yield rng.randbytes(rng.randrange(200))
            case 1:
                yield bytes(frame[: rng.randrange(len(frame) + 1)])
            case 2:
                yield bytes(frame + rng.randbytes(rng.randrange(40)))
            case 3:
                other = rng.choice(honest)
                yield bytes(frame[: rng.randrange(len(frame))] + other[rng.randrange(len(other)) :])
            case _:
                for _ in range(rng.randrange(1, 6)):
                    frame[rng.randrange(len(frame))] = rng.randrange(256)
                yield bytes(frame)


@pytest.mark.timeout(280)
async def test_fuzzed_frames_leave_a_live_stage_sound():
    network = MemoryNetwork()
    stages = toys()
    rng = random.Random(20)
    frames = mutations(rng)
    async with toy_swarm(network=network, stages=stages) as swarm:

        async def attack(count):
            async with network.open("mallory") as mallory, trio.open_nursery() as nursery:

                async def drain():
                    while True:
                        await mallory.receive()

                nursery.start_soon(drain)
                hello = encode(Hello(version=PROTOCOL_VERSION, sender=PeerInfo(peer="mallory", addresses=())))
                for _ in range(count):
                    target = f"stage{rng.randrange(NUM_STAGES)}"
                    try:
                        if target not in mallory.connected:
                            await mallory.connect(f"memory:{target}", 1)
                            await mallory.send(target, hello)
                        await mallory.send(target, next(frames))
                    except PeerError:
                        continue
                nursery.cancel_scope.cancel()

        logging.disable(logging.CRITICAL)  # pytest would keep every warning
        await attack(5_000)
        await swarm.write(PROMPT, 20, TREE)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        await attack(95_000 if IS_ALL else 25_000)
        tokens, _ = await swarm.write(PROMPT, 20, TREE)
        assert tokens == plain_text(PROMPT, 20)
        with trio.fail_after(20):
            await swarm.all_closed()
        gc.collect()
        grown = sum(stat.size_diff for stat in tracemalloc.take_snapshot().compare_to(before, "filename"))
        tracemalloc.stop()
        assert [stage.num_caches for stage in stages] == [0, 0, 0]
        logging.disable(logging.NOTSET)
        assert grown < 2 << 20


@pytest.mark.parametrize("error", [RemoteProtocolError])
def test_an_oversize_header_is_refused_without_reading_it(error):
    with pytest.raises(error, match="header length"):
        decode(bytes([PROTOCOL_VERSION]) + (1 << 23).to_bytes(3, "little") + bytes(100))


def test_an_opening_is_signed_as_it_is_read():
    """A whole number of seconds is read as a fraction."""
    opened = open_message(idle_timeout_s=5)
    assert signed_opening(decode(encode(opened)).message) == signed_opening(opened)

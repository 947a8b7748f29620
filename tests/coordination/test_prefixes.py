"""Text that stages hold of closed sessions: who may go on from it, what is sent then, and what gives way to what."""

import random

import numpy as np
import pytest
import trio
from msgspec.structs import replace
from swarms import load_stages, model_swarm, signed
from toy import plain_text, toy_route
from toy_drafts import TREE
from toy_model import ToySpanModel
from toy_swarm import NUM_STAGES, TappedNetwork, toy_swarm, toys

from dsd_p2p.cache.slots import CacheEdit, SlotTable
from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.coordination.prefixes import PrefixIndex, scope_of
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import LocalProtocolError, PrefixLost
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.peers.links import Arrived
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.parking import Parked, ParkedTexts
from dsd_p2p.telemetry.events import Replayed, SessionEnded
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import HiddenFormat, Span, TextRequest
from dsd_p2p.window.static import PLAIN, StaticPolicy, sync_chain
from dsd_p2p.wire.messages import CloseSession, Failure, FailureKind, OpenSession, Park, Prefix, Window

PROMPT = [1, 2, 3, 4, 5, 6] * 5
MODES = pytest.mark.parametrize("decision", [PLAIN, sync_chain(4), TREE], ids=["plain", "sync", "tree"])


async def write_beside_others(swarm, prompt, num_tokens, decision=TREE, owner="alice", **options):
    options = GenerateOptions(text=TextRequest(max_tokens=num_tokens), owner=owner, **options)
    with trio.fail_after(60):
        async with swarm.engine.generate(prompt, options, StaticPolicy(decision)) as generation:
            tokens = [token async for token in generation]
    return tokens, generation.stats


async def write(swarm, *args, **options):
    written = await write_beside_others(swarm, *args, **options)
    await swarm.all_closed()
    return written


def first(network, kind):
    return next(message for *_, message, _ in network.log if isinstance(message, kind))


def failures(network):
    return [message for *_, message, _ in network.log if isinstance(message, Failure)]


def num_parked(swarm):
    return [len(server.parking.texts) for server in swarm.servers]


async def until(condition):
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what happens at stages sets no event here
            await trio.sleep(0.01)


async def all_free(models):
    """One that is copied or shrunk right now is free in a moment."""
    await until(lambda: not any(model.num_caches for model in models))


@MODES
async def test_the_next_turn_sends_only_what_is_new(decision):
    network = TappedNetwork()
    async with toy_swarm(network=network) as swarm:
        first, stats = await write(swarm, PROMPT, 20, decision)
        assert (first, stats.num_prefix_tokens) == (plain_text(PROMPT, 20), 0)
        turn = [*PROMPT, *first, 0, 1, 2]
        network.log.clear()
        second, stats = await write(swarm, turn, 20, decision)
        assert second == plain_text(turn, 20)
        # The last token of an answer has been through no stage, and the last of a prompt is a draft tree's root.
        assert stats.num_prefix_tokens == len(PROMPT) + 19
        assert stats.num_prefix_tokens + stats.num_prefill_tokens == len(turn) - 1
        positions = [p for *_, message, _ in network.log if isinstance(message, Window) for p in message.positions]
        assert min(positions) == stats.num_prefix_tokens
        third, stats = await write(swarm, [*turn, *second], 20, decision)
        assert third == plain_text([*turn, *second], 20)
        assert stats.num_prefix_tokens == len(turn) + 19
        # What a longer text holds, too, is thrown away.
        await trio.testing.wait_all_tasks_blocked()
        assert num_parked(swarm) == [1, 1, 1]


async def test_a_common_beginning_is_shared_at_once_and_left_to_others():
    async with toy_swarm(limits=StageLimits(sessions=Scopes(what="sessions", node=64, root=64, peer=64))) as swarm:
        await write(swarm, PROMPT, 5)
        others = [[*PROMPT[:24], index, index] for index in range(6)]
        texts: dict[int, tuple[list[int], object]] = {}

        async def one(index: int) -> None:
            texts[index] = await write_beside_others(swarm, others[index], 12)

        async with trio.open_nursery() as nursery:
            for index in range(6):
                nursery.start_soon(one, index)
        for index, prompt in enumerate(others):
            tokens, stats = texts[index]
            assert tokens == plain_text(prompt, 12)
            assert stats.num_prefix_tokens >= 24


async def test_nobody_elses_text_is_used():
    async with toy_swarm() as swarm:
        await write(swarm, PROMPT, 10)
        for owner in ("bob", ""):
            _, stats = await write(swarm, PROMPT, 10, owner=owner)
            assert stats.num_prefix_tokens == 0
        assert num_parked(swarm) == [2, 2, 2], "alice's and bob's; who has no name leaves nothing"
        _, stats = await write(swarm, PROMPT, 10)
        assert stats.num_prefix_tokens == len(PROMPT) - 1


async def test_who_leaves_early_leaves_nothing():
    models = toys()
    async with toy_swarm(stages=models) as swarm:
        options = GenerateOptions(text=TextRequest(max_tokens=200), owner="alice")
        async with swarm.engine.generate(PROMPT, options, StaticPolicy(TREE)) as generation:
            await generation.__anext__()
        await swarm.all_closed()
        assert num_parked(swarm) == [0, 0, 0]
        await all_free(models)


@MODES
@pytest.mark.parametrize("stage", range(NUM_STAGES))
async def test_a_stage_that_holds_it_no_longer_is_given_all(stage, decision):
    async with toy_swarm() as swarm:
        first, _ = await write(swarm, PROMPT, 20, decision)
        swarm.servers[stage].parking.texts.clear()
        turn = [*PROMPT, *first, 3]
        second, stats = await write(swarm, turn, 20, decision)
        assert second == plain_text(turn, 20)
        assert (stats.num_prefix_tokens, stats.num_replays) == (0, 0)
        _, stats = await write(swarm, [*turn, *second], 5, decision)
        assert stats.num_prefix_tokens == len(turn) + 19, "it is held again"


async def test_what_is_parked_gives_way_to_sessions():
    models = toys(max_caches=2)
    async with toy_swarm(stages=models) as swarm:
        for seed in range(4):
            prompt = [seed, *PROMPT]
            tokens, _ = await write(swarm, prompt, 8)
            assert tokens == plain_text(prompt, 8)
        assert all(model.num_caches <= 2 for model in models)
        # The one text that there is room for beside a session is its own beginning.
        tokens, stats = await write(swarm, [3, *PROMPT, 1], 8)
        assert tokens == plain_text([3, *PROMPT, 1], 8)
        assert stats.num_prefix_tokens == 1 + len(PROMPT)
    models = toys(max_caches=1)
    async with toy_swarm(stages=models) as swarm:
        for _ in range(3):
            tokens, stats = await write(swarm, PROMPT, 8)
            assert (tokens, stats.num_prefix_tokens) == (plain_text(PROMPT, 8), 0)


async def test_it_goes_with_its_coordinator_with_other_layers_and_with_time():
    models = toys()
    async with toy_swarm(stages=models) as swarm:
        await write(swarm, PROMPT, 8)
        assert num_parked(swarm) == [1, 1, 1]
        await swarm.servers[0].serve_span(models[0])
        swarm.servers[1].lost(Lost(peer="coordinator", reason="gone"))
        await swarm.servers[2].drain(1)
        assert num_parked(swarm) == [0, 0, 0]
        await all_free(models)
    models = toys()
    async with toy_swarm(stages=models, limits=StageLimits(parked_s=0.05, max_parked=2)) as swarm:
        for seed in range(4):
            await write(swarm, [seed, *PROMPT], 8)
            assert max(num_parked(swarm)) <= 2
        await until(lambda: not any(num_parked(swarm)))
        await all_free(models)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"prefix": Prefix(session=b"unknown!", num_tokens=20)}, FailureKind.PREFIX),
        ({"prefix": Prefix(session=b"unknown!", num_tokens=len(PROMPT))}, FailureKind.PROTOCOL),
        ({"prefix": Prefix(session=b"unknown!", num_tokens=3), "attest": True}, FailureKind.PROTOCOL),
        ({"num_prompt": len(PROMPT) + 1}, FailureKind.PROTOCOL),
        ({"prefix": Prefix(session=b"unknown!", num_tokens=len(PROMPT) - 1), "num_prompt": 3}, FailureKind.PROTOCOL),
    ],
    ids=["not parked", "whole prompt", "attested", "longer than given", "beyond the prompt"],
)
async def test_a_prefix_that_cannot_be_is_refused(change, kind):
    network = TappedNetwork()
    async with toy_swarm(network=network) as swarm:
        await write(swarm, PROMPT, 8)
        opened = first(network, OpenSession)
        network.log.clear()
        await swarm.engine.links.send("stage0", signed(replace(opened, session=b"new-sess", **change)))
        await until(lambda: failures(network))
        assert failures(network)[0].kind is kind
        assert swarm.servers[0].num_sessions == 0


async def test_another_coordinators_text_is_not_there_for_us():
    network = TappedNetwork()
    async with toy_swarm(network=network) as swarm:
        await write(swarm, PROMPT, 8)
        opened = first(network, OpenSession)
        server = swarm.servers[0]
        thief = replace(opened.coordinator, peer="thief")
        stolen = Prefix(session=opened.session, num_tokens=20)
        theirs = signed(
            replace(opened, session=b"new-sess", coordinator=thief, prefix=stolen, num_prompt=22, num_given=22)
        )
        arrived = Arrived(sender="thief", message=theirs, payload=memoryview(b""), num_bytes=0)
        await server.handlers[OpenSession](arrived, theirs)
        session = server.sessions[b"new-sess"]
        with trio.fail_after(10):
            await session.is_over.wait()
        assert "not parked here" in str(session.error)
        assert num_parked(swarm) == [1, 1, 1]


@pytest.mark.parametrize("park", [Park(at=(0, 500), num_tokens=900), Park(at=(7, 3), num_tokens=400)])
async def test_more_than_there_is_cannot_be_parked(park):
    models = toys()
    network = TappedNetwork()
    async with toy_swarm(stages=models, network=network) as swarm:
        options = GenerateOptions(text=TextRequest(max_tokens=200))
        async with swarm.engine.generate(PROMPT, options, StaticPolicy(PLAIN)) as generation:
            await generation.__anext__()
            opened = first(network, OpenSession)
            await swarm.engine.links.send("stage1", CloseSession(session=opened.session, epoch=9, park=park))
        await swarm.all_closed()
        assert num_parked(swarm) == [0, 0, 0]
        await all_free(models)


async def test_one_name_parked_twice_is_held_once():
    models = toys()
    network = TappedNetwork()
    async with toy_swarm(stages=models, network=network) as swarm:
        await write(swarm, PROMPT, 8)
        opened = first(network, OpenSession)
        closed = first(network, CloseSession)
        prefix = Prefix(session=opened.session, num_tokens=20)
        for epoch in range(1, 5):
            again = signed(replace(opened, epoch=closed.epoch + epoch, prefix=prefix, num_prompt=22, num_given=22))
            park = Park(at=(again.epoch, 19), num_tokens=20)
            await swarm.engine.links.send("stage0", again)
            await until(lambda: swarm.servers[0].sessions and swarm.servers[0].sessions[opened.session].held.cache)
            close = CloseSession(session=opened.session, epoch=again.epoch, park=park)
            for name in ("stage0", "stage1", "stage2"):
                await swarm.engine.links.send(name, close)
            await swarm.all_closed()
        assert num_parked(swarm)[0] == 1
        # Without `park` a close ends both, the text that is held and the session that goes on from it.
        await swarm.engine.links.send(
            "stage0", signed(replace(opened, epoch=99, prefix=prefix, num_prompt=22, num_given=22))
        )
        await until(lambda: swarm.servers[0].sessions)
        for name in ("stage0", "stage1", "stage2"):
            await swarm.engine.links.send(name, CloseSession(session=opened.session, epoch=99))
        await swarm.all_closed()
        assert num_parked(swarm)[0] == 0
        for server in swarm.servers:
            server.parking.texts.clear()
        await all_free(models)


async def test_a_text_that_is_still_to_be_parked_is_waited_for():
    async with toy_swarm() as swarm:
        server = swarm.servers[1]
        send, late = swarm.engine.links.send, []

        async def hold_back_the_close(to, message, *payload):
            if to == server.links.me.peer and isinstance(message, CloseSession) and not late:
                late.append((to, message))
            else:
                await send(to, message, *payload)

        swarm.engine.links.send = hold_back_the_close
        tokens, _ = await write_beside_others(swarm, PROMPT, 20)
        turn = [*PROMPT, *tokens, 1]
        written = []

        async def write_the_next_turn():
            written.append(await write(swarm, turn, 8))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_the_next_turn)
            await until(lambda: len(server.sessions) == 2)
            await trio.sleep(0.05)
            await send(*late[0])
        ((tokens, stats),) = written
        assert tokens == plain_text(turn, 8)
        assert (stats.num_prefix_tokens, stats.num_replays) == (len(PROMPT) + 19, 0)


async def test_a_close_that_never_comes_is_not_waited_for_for_long(monkeypatch):
    monkeypatch.setattr("dsd_p2p.stage.task._PARKING_TIMEOUT_S", 0.05)
    network = TappedNetwork()
    async with toy_swarm(network=network) as swarm:
        options = GenerateOptions(text=TextRequest(max_tokens=200))
        async with swarm.engine.generate(PROMPT, options, StaticPolicy(PLAIN)) as generation:
            await generation.__anext__()
            opened = first(network, OpenSession)
            prefix = Prefix(session=opened.session, num_tokens=20)
            await swarm.engine.links.send(
                "stage0", signed(replace(opened, session=b"new-sess", prefix=prefix, num_prompt=22, num_given=22))
            )
            await until(lambda: failures(network))
            assert failures(network)[0].kind is FailureKind.PREFIX


async def test_what_was_never_copied_is_not_parked():
    models = toys()
    network = TappedNetwork()
    async with toy_swarm(stages=models, network=network) as swarm:
        await write(swarm, PROMPT, 8)
        opened = first(network, OpenSession)
        server = swarm.servers[0]
        async with server.work.model_in_use:
            prefix = Prefix(session=opened.session, num_tokens=20)
            await swarm.engine.links.send(
                "stage0", signed(replace(opened, session=b"new-sess", prefix=prefix, num_prompt=22, num_given=22))
            )
            await until(lambda: server.sessions)
            park = Park(at=(opened.epoch, 19), num_tokens=20)
            await swarm.engine.links.send("stage0", CloseSession(session=b"new-sess", epoch=9, park=park))
            await until(lambda: not server.sessions)
        assert [name for _, name in server.parking.texts._texts] == [opened.session]
        server.parking.texts.clear()
        await until(lambda: models[0].num_caches == 0)


async def test_a_text_of_a_coordinator_that_went_is_not_parked():
    models = toys()
    network = TappedNetwork()
    async with toy_swarm(stages=models, network=network) as swarm:
        options = GenerateOptions(text=TextRequest(max_tokens=200))
        async with swarm.engine.generate(PROMPT, options, StaticPolicy(PLAIN)) as generation:
            await generation.__anext__()
            server = swarm.servers[1]
            (session,) = server.sessions.values()
            session.park = Park(at=(session.held.state.epoch, 0), num_tokens=1)
            server.lost(Lost(peer="coordinator", reason="gone"))
            await session.is_over.wait()
            assert len(server.parking.texts) == 0


async def test_a_text_that_cannot_be_shrunk_is_lost_and_nothing_else():
    models = toys()
    async with toy_swarm(stages=models) as swarm:
        cache_of = models[1].new_cache

        def spoiled(max_slots, mark=0):
            cache = cache_of(max_slots)
            cache.shrink = lambda: 1 / 0
            return cache

        models[1].new_cache = spoiled
        await write(swarm, PROMPT, 8)
        await until(lambda: num_parked(swarm) == [1, 0, 1])
        tokens, stats = await write(swarm, [*PROMPT, 1], 8)
        assert (tokens, stats.num_prefix_tokens) == (plain_text([*PROMPT, 1], 8), 0)


async def test_a_second_opening_is_no_failover():
    told = []
    async with toy_swarm() as swarm:
        swarm.engine.tell = told.append
        await write(swarm, PROMPT, 8)
        swarm.servers[1].parking.texts.clear()
        await write(swarm, [*PROMPT, 1], 8)
    assert not [event for event in told if isinstance(event, Replayed)]
    assert len([event for event in told if isinstance(event, SessionEnded)]) == 2


def parked(coordinator, name):
    cache = ToySpanModel(Span(0, 1), 1).new_cache(1)
    return Parked(coordinator=coordinator, session=name, span=Span(0, 1), cache=cache, num_tokens=1)


def test_who_has_the_most_gives_way_first():
    texts = ParkedTexts(3)
    for coordinator, name in (("small", b"1"), ("greedy", b"2"), ("greedy", b"3"), ("greedy", b"4")):
        texts.add(parked(coordinator, name))
    assert [name for _, name in texts._texts] == [b"1", b"3", b"4"]


def test_what_holds_an_old_text_does_not_end_the_new_one_of_its_name():
    texts, old, new = ParkedTexts(3), parked("alice", b"1"), parked("alice", b"1")
    texts.add(old)
    texts.add(new)
    assert old.cache._is_free
    texts.remove(old)
    assert len(texts) == 1
    texts.remove(new)
    assert new.cache._is_free


def test_the_longest_common_beginning_is_found_and_the_index_stays_small():
    index, route = PrefixIndex(), toy_route(2)
    alice, bob = (scope_of(owner, route, HiddenFormat.MODEL) for owner in ("alice", "bob"))
    text = list(range(100))
    assert index.find(alice, text, 0) is None
    assert index.add(alice, route, b"a", text[:20], 10, 0) == []
    assert [name for name, _ in index.add(alice, route, b"b", [*text[:40], 7], 10, 0)] == [b"a"], (
        "all of it is in the new one"
    )
    assert index.find(alice, text, 0) == Prefix(session=b"b", num_tokens=40)
    assert index.find(alice, text[:30], 0) == Prefix(session=b"b", num_tokens=29)
    assert index.find(alice, text[:10], 0) is None, "too little to be worth it"
    assert index.find(bob, text, 0) is None
    assert index.find(scope_of("alice", route, HiddenFormat.BF16), text, 0) is None, "computed from other values"
    assert index.find(scope_of("alice", toy_route(3), HiddenFormat.MODEL), text, 0) is None
    assert index.add(alice, route, b"c", text, 10, 0) == []
    assert index.find(alice, text, 0) == Prefix(session=b"c", num_tokens=99)
    assert index.forget(b"c") is route
    assert index.forget(b"c") is None
    assert index.find(alice, text, 0) == Prefix(session=b"b", num_tokens=40)
    dropped = [name for number in range(200) for name, _ in index.add(bob, route, b"%d" % number, [number] * 50, 10, 0)]
    assert dropped[0] == b"b"
    assert len(dropped) == len(set(dropped)) == 200 + 1 - 64


@MODES
@pytest.mark.parametrize("seed", range(3))
async def test_conversations_over_random_interleavings_stay_exact(seed, decision):
    rng = random.Random(seed)
    async with toy_swarm(limits=StageLimits(sessions=Scopes(what="sessions", node=64, root=64, peer=64))) as swarm:

        async def talk(owner: str) -> None:
            text = list(PROMPT[: rng.randrange(10, 30)])
            for _ in range(6):
                num_tokens = rng.randrange(1, 24)
                tokens, _ = await write_beside_others(swarm, text, num_tokens, decision, owner=owner)
                assert tokens == plain_text(text, num_tokens)
                # Often not where the answer ended: clients edit, and templates split text in other places.
                kept = len(text) + rng.randrange(num_tokens + 1)
                text = [*[*text, *tokens][:kept], rng.randrange(7)]
                if rng.random() < 0.3:
                    rng.choice(swarm.servers).parking.texts.evict()

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(talk, f"owner{number % 3}")


async def test_a_conversation_with_a_real_model_is_what_it_is_without():
    models = load_stages(find_model("smollm2-135m", NoProgress()), 3)
    text = [int(token) for token in np.random.default_rng(5).integers(0, 49152, 60)]
    turns: dict[str, list[list[int]]] = {"": [], "alice": []}
    async with model_swarm(models, NgramDrafter()) as swarm:
        for owner, answers in turns.items():
            prompt = list(text)
            for number in range(3):
                tokens, stats = await write(swarm, prompt, 24, owner=owner)
                answers.append(tokens)
                assert (stats.num_prefix_tokens > 0) == bool(owner and number)
                prompt = [*prompt, *tokens, 1, 2, 3]
        assert turns["alice"] == turns[""]
        held = [server._model.budget.used_bytes for server in swarm.servers]
        assert 0 < max(held) < 64 << 20, "no more than the text is held"


def test_a_copy_of_a_cache_holds_its_beginning_and_a_shrunk_one_no_more_than_it_needs():
    model = open_span(find_model("smollm2-135m", NoProgress()), Span(0, 2), cache_bytes=1 << 26)
    tokens = list(range(10))

    def run(cache, table, start, end):
        nodes = tokens[start:end]
        forward = table.append(nodes, [None, *nodes[:-1]], nodes)
        rows = np.frombuffer(model.hidden(cache, forward, nodes), np.float32)
        table.settle(nodes[-1])
        return rows

    whole, table = model.new_cache(100), SlotTable()
    slot_bytes = model.budget.used_bytes // 100
    run(whole, table, 0, 6)
    expected = run(whole, table, 6, 10)
    whole.shrink()
    assert model.budget.used_bytes == 10 * slot_bytes
    copied = model.new_cache(50)
    copied.copy(whole, 6)
    whole.free()
    assert model.budget.used_bytes == 50 * slot_bytes
    assert np.array_equal(run(copied, SlotTable(6), 6, 10), expected)
    with pytest.raises(PrefixLost):
        model.new_cache(50).copy(copied, 11)
    with pytest.raises(LocalProtocolError):
        copied.edit(CacheEdit(num_kept=11, gathered=np.empty(0, np.int64)))
    with pytest.raises(LocalProtocolError):
        copied.edit(CacheEdit(num_kept=2, gathered=np.array([10])))
    copied.free()
    copied.shrink()
    copied.free()
    assert model.budget.used_bytes == 50 * slot_bytes, "the one that could not be filled"

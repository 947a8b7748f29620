"""Drafts from a peer: the same text wherever it is drafted, and a peer that fails in any way costs only guesses."""

import random
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from swarms import TEST_MODEL
from toy import VOCAB
from toy import plain_text as truth
from toy_drafts import TREE, drafter
from toy_model import ToyDrafter
from toy_swarm import toy_swarm

from dsd_p2p.coordination.draft_places import HOME, DraftPlaces, Offer
from dsd_p2p.coordination.draft_service import DraftService, _Trie
from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.coordination.far_drafts import _lattice
from dsd_p2p.drafting.choice import Loop
from dsd_p2p.errors import CapacityError, RemoteProtocolError
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.services import run_services
from dsd_p2p.types import ComputeFormat, ModelKey, PeerInfo, Sampling, TextRequest
from dsd_p2p.window.static import StaticPolicy
from dsd_p2p.wire.drafts import AskDraft, Drafted, EndDrafts, OpenDrafts

NUM_TOKENS = 140
PROMPT = [1, 2, 3]
OFFER = Offer(drafter="shadow+ngram", step_s=0.002, round_trip_s=0.002)


class SlowDrafter(ToyDrafter):
    """A drafter at home that takes its time."""

    name = "shadow+ngram"

    def __init__(self):
        super().__init__(drafter(0.9, random.Random(0)), is_instant=False)

    def expand(self, draft):
        time.sleep(0.012)
        return super().expand(draft)


class CountingDrafter(ToyDrafter):
    """A drafter at the peer."""

    def __init__(self, accuracy=0.95):
        super().__init__(drafter(accuracy, random.Random(1)), is_instant=False)
        self.num_open = self.num_asked = 0

    def open(self, max_length, sampling=None):
        self.num_open += 1
        return self

    def expand(self, draft):
        self.num_asked += 1
        assert list(draft.keys) == sorted(set(draft.keys), key=list(draft.keys).index)
        return super().expand(draft)

    def close(self):
        self.num_open -= 1


class NotedPlaces(DraftPlaces):
    """Places that keep a list of the outcomes they are told."""

    def __init__(self, offers):
        super().__init__(offers)
        self.outcomes = []

    def outcome(self, place, offer, *, is_hit):
        self.outcomes.append((place, is_hit))
        super().outcome(place, offer, is_hit=is_hit)


@asynccontextmanager
async def far_swarm(far_drafter, *, change=None, offer=OFFER):
    """A swarm whose coordinator has a slow drafter and a peer with another one. change: what the peer's answers become."""
    async with (
        toy_swarm(link=LinkModel(latency_s=0.005)) as swarm,
        swarm.network.open("drafter") as transport,
        trio.open_nursery() as nursery,
    ):
        links = PeerLinks(transport, PeerInfo(peer="drafter", addresses=("memory:drafter",)))
        if change is not None:
            send = links.send

            async def changed(to, message, payload=b""):
                for each in change(message) if isinstance(message, Drafted) else [message]:
                    await send(to, each, payload)

            links.send = changed
        service = DraftService(links, lambda message: far_drafter.open(message.max_length), TEST_MODEL)
        nursery.start_soon(run_services, links, [service])
        engine = swarm.engine
        engine.own_drafter.current = SlowDrafter()
        await engine.links.connect("memory:drafter", 5)
        engine.places = NotedPlaces(lambda: {"drafter": offer} if engine.links.is_connected("drafter") else {})
        yield swarm, service, transport
        nursery.cancel_scope.cancel()


async def write(swarm, num_tokens=NUM_TOKENS):
    tokens, generation = await swarm.write(PROMPT, num_tokens, TREE)
    assert tokens == truth(PROMPT, num_tokens)
    await swarm.all_closed()
    return generation


async def test_a_request_moves_to_the_faster_drafter_and_writes_the_same_text():
    far = CountingDrafter()
    async with far_swarm(far) as (swarm, service, _):
        generation = await write(swarm)
        assert generation.driver.drafter in ("shadow+ngram at drafter", "shadow+ngram", "ngram")
        assert far.num_asked > 20
        with trio.fail_after(5):
            while far.num_open or service.num_sessions:  # noqa: ASYNC110 - a state of another peer
                await trio.sleep(0.01)


async def test_nobody_moves_to_a_drafter_that_promises_less():
    far = CountingDrafter()
    async with far_swarm(far, offer=Offer(drafter="shadow+ngram", step_s=0.2, round_trip_s=0.3)) as (swarm, _, _):
        home = Offer(drafter="shadow+ngram", step_s=0.02, round_trip_s=0)
        swarm.engine.places.took(HOME, home, 0.02, trio.current_time())
        generation = await write(swarm, 60)
        assert generation.driver.drafter == "shadow+ngram"
        assert not far.num_asked


LIES = {
    "silent": lambda answer: [],
    "another number": lambda answer: [msgspec.structs.replace(answer, number=answer.number + 7)],
    "no tokens": lambda answer: [msgspec.structs.replace(answer, tokens=())],
    "outside the vocabulary": lambda answer: [
        msgspec.structs.replace(answer, tokens=tuple(token + VOCAB for token in answer.tokens))
    ],
    "twice the same": lambda answer: [msgspec.structs.replace(answer, tokens=(1,) * len(answer.tokens))],
    "no such parent": lambda answer: [msgspec.structs.replace(answer, parents=(5,) * len(answer.tokens))],
    "likelier last": lambda answer: [
        msgspec.structs.replace(answer, centinats=tuple(range(len(answer.tokens), 0, -1)))
    ],
    "refused": lambda answer: [Drafted(draft=answer.draft, number=answer.number, error="no")],
    "each answer twice": lambda answer: [answer, answer],
}


@pytest.mark.parametrize("how", LIES)
async def test_a_peer_that_lies_or_is_silent_costs_only_guesses(how):
    """From the start, and after twenty good answers."""
    for num_good in (0, 8):
        seen = iter(range(10**6))
        change = lambda answer, seen=seen, num_good=num_good: [answer] if next(seen) < num_good else LIES[how](answer)  # noqa: E731
        far = CountingDrafter()
        async with far_swarm(far, change=change) as (swarm, _, _):
            generation = await write(swarm)
            assert far.num_asked > num_good
            if how != "each answer twice":
                assert generation.driver.drafter in ("shadow+ngram", "ngram")


async def test_wrong_guesses_of_a_peer_are_held_against_it():
    """Its answers are well formed and its tokens are never the target's."""
    far = CountingDrafter(accuracy=0.0)
    async with far_swarm(far) as (swarm, _, _):
        await write(swarm, 300)
        of_the_peer = [is_hit for place, is_hit in swarm.engine.places.outcomes if place == "drafter"]
    assert far.num_asked > 1
    assert of_the_peer
    assert not any(of_the_peer)


def test_a_place_with_wrong_guesses_is_left():
    places = DraftPlaces(lambda: {"drafter": OFFER})
    home = Offer(drafter="shadow+ngram", step_s=0.012, round_trip_s=0)
    loop = Loop(traversal_s=0.03, slowest_s=0.005)
    assert places.best(home, loop, HOME, 0.0) == "drafter"
    for _ in range(60):
        places.outcome("drafter", OFFER, is_hit=False)
    assert places.best(home, loop, "drafter", 0.0) == HOME


async def test_a_peer_that_is_lost_in_mid_answer_is_left():
    far = CountingDrafter()
    async with far_swarm(far) as (swarm, _, transport):
        tokens = []
        options = GenerateOptions(text=TextRequest(max_tokens=NUM_TOKENS))
        with trio.fail_after(60):
            async with swarm.engine.generate(PROMPT, options, StaticPolicy(TREE)) as generation:
                async for token in generation:
                    tokens.append(token)
                    if len(tokens) == 80:
                        await transport.disconnect("coordinator", "killed")
        assert tokens == truth(PROMPT, NUM_TOKENS)
        assert far.num_asked > 1
        assert generation.driver.drafter in ("shadow+ngram", "ngram")


# The drafting peer's side


class Heard:
    """A service that keeps the answers it hears."""

    def __init__(self):
        self.heard, self.answers = trio.open_memory_channel(100)
        self.handlers = {Drafted: self.hear}

    def start(self, nursery):
        pass

    def lost(self, event):
        pass

    async def hear(self, event, message):
        self.heard.send_nowait(message)


@asynccontextmanager
async def service_alone(far_drafter):
    """A drafting peer and a client that speaks to it message by message."""
    async with toy_swarm() as swarm, swarm.network.open("drafter") as transport, trio.open_nursery() as nursery:
        links = PeerLinks(transport, PeerInfo(peer="drafter", addresses=("memory:drafter",)))
        service = DraftService(links, lambda message: far_drafter.open(message.max_length), TEST_MODEL)
        nursery.start_soon(run_services, links, [service])
        async with swarm.network.open("client") as mine:
            client = PeerLinks(mine, PeerInfo(peer="client", addresses=("memory:client",)))
            heard = Heard()
            nursery.start_soon(run_services, client, [heard])
            await client.connect("memory:drafter", 5)
            client.answers = heard.answers
            yield client, service
        nursery.cancel_scope.cancel()


def opening(number, model=TEST_MODEL):
    return OpenDrafts(draft=bytes([number] * 8), model=model, max_length=100, sampling=Sampling())


def question(number, *, start=0, tokens=(1, 2, 3), ask=0, levels=1):
    return AskDraft(
        draft=bytes([number] * 8), number=ask, start=start, tokens=tokens, stems=((),), width=2, levels=levels
    )


async def answer_to(client, *messages):
    for message in messages:
        await client.send("drafter", message)
    with trio.fail_after(5):
        return await client.answers.receive()


async def test_several_levels_come_in_one_answer_likeliest_first():
    far = CountingDrafter(accuracy=1.0)
    async with service_alone(far) as (client, _):
        answer = await answer_to(client, opening(1), question(1, tokens=tuple(PROMPT), levels=4))
        assert len(answer.tokens) == 8
        assert answer.parents[:2] == (-1, -1)
        assert [answer.tokens[2 * level] for level in range(4)] == truth(PROMPT, 4)
        assert far.num_asked == 4


async def test_a_draft_is_bounded_and_freed():
    far = CountingDrafter()
    async with service_alone(far) as (client, service):
        for number in range(4):
            await answer_to(client, opening(number), question(number))
        refused = await answer_to(client, opening(9))
        assert "drafts are yours" in refused.error
        await client.send("drafter", EndDrafts(draft=bytes(8)))
        await answer_to(client, opening(9), question(9))
        assert service.num_sessions == 4
        other = ModelKey(digest="another", weights="float32", compute=ComputeFormat.FLOAT32)
        await client.send("drafter", EndDrafts(draft=bytes([9] * 8)))
        assert "another" in (await answer_to(client, opening(10, other))).error
        await client.transport.disconnect("drafter", "gone")
        with trio.fail_after(5):
            while service.num_sessions or far.num_open:  # noqa: ASYNC110 - a state of another peer
                await trio.sleep(0.01)


@pytest.mark.parametrize(
    "bad",
    [
        [opening(1), opening(1)],
        [opening(1), question(1, start=5)],
        [opening(1), question(1, tokens=())],
        [opening(1), question(1), question(1, start=3, ask=1)],
    ],
    ids=["opened twice", "a gap", "no text", "two at once"],
)
async def test_a_client_that_breaks_the_rules_is_dropped(bad):
    class Slow(CountingDrafter):
        def expand(self, draft):
            time.sleep(0.1)
            return super().expand(draft)

    far = Slow()
    async with service_alone(far) as (client, service):
        for message in bad:
            await client.send("drafter", message)
        with trio.fail_after(5):
            while client.is_connected("drafter"):  # noqa: ASYNC110 - a state of another peer
                await trio.sleep(0.01)
            while service.num_sessions or far.num_open:  # noqa: ASYNC110 - a state of another peer
                await trio.sleep(0.01)


async def test_a_drafter_without_room_says_so():
    class Full(CountingDrafter):
        def open(self, max_length, sampling=None):
            raise CapacityError("full")

    async with service_alone(Full()) as (client, _):
        assert (await answer_to(client, opening(1))).error == "full"


# Pure parts


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 12), st.integers(0, VOCAB + 2), st.integers(0, 500)), max_size=20))
def test_any_answer_is_a_tree_or_refused(guesses):
    parents, tokens, centinats = zip(*guesses, strict=True) if guesses else ((), (), ())
    answer = Drafted(draft=bytes(8), number=0, parents=parents, tokens=tokens, centinats=centinats)
    ask = AskDraft(draft=bytes(8), number=0, start=0, tokens=(1,), stems=((), (4,)), width=3, levels=2)
    try:
        below = _lattice(answer, ask, VOCAB)
    except RemoteProtocolError:
        return

    def check(siblings, depth):
        assert len(siblings) <= 3
        assert depth <= 2 or not siblings
        assert len({each.token for each in siblings}) == len(siblings)
        assert all(each.token < VOCAB for each in siblings)
        assert sorted((each.logprob for each in siblings), reverse=True) == [each.logprob for each in siblings]
        return len(siblings) + sum(check(each.below, depth + 1) for each in siblings)

    assert sum(check(siblings, 1) for siblings in below) == len(guesses)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12))
def test_a_path_keeps_its_keys_when_it_is_committed(rounds):
    trie = _Trie()
    trie.extend((1, 2))
    for path in rounds:
        stem = trie.stem(tuple(path))
        assert [token for _, token in stem.path] == path
        trie.extend(tuple(path))
        assert trie.keys[len(trie.keys) - len(path) :] == [key for key, _ in stem.path]
    assert len(set(trie.keys)) == len(trie.keys)


async def test_a_drafter_that_breaks_while_it_is_measured_ends_nothing():
    """It is measured in the nursery of all requests."""

    class Breaks:
        is_loaded = wants_texts = True
        current, step_s, may_fetch, refusals = SlowDrafter(), 0.0, False, ()

        def learn(self, tokens, num_prompt, loop):
            raise RuntimeError("torch is out of memory")

    async with toy_swarm() as swarm:
        swarm.engine.own_drafter._choice = Breaks()
        for _ in range(2):
            await write(swarm, 30)
        with trio.fail_after(5):
            while not swarm.engine.own_drafter.failure:  # noqa: ASYNC110 - a state of another task
                await trio.sleep(0.01)
        assert "torch is out of memory" in swarm.engine.own_drafter.failure


def test_places_are_rated_by_what_they_promise_until_they_are_measured():
    home = Offer(drafter="shadow", step_s=0.09, round_trip_s=0.0)
    near = Offer(drafter="shadow", step_s=0.015, round_trip_s=0.01)
    places = DraftPlaces(lambda: {"near": near, "lookup": Offer(drafter="ngram", step_s=0.0, round_trip_s=0.001)})
    loop = Loop(traversal_s=0.2, slowest_s=0.01)
    assert places.best(home, loop, HOME, 0.0) == "near"
    # It boasted.
    places.took("near", near, 0.2, 1.0)
    assert places.best(home, loop, "near", 1.0) == HOME
    # Perhaps it was only busy: it is tried again.
    assert places.best(home, loop, HOME, 100.0) == "near"
    places.failed("near", 100.0, is_liar=True)
    assert places.best(home, loop, HOME, 200.0) == HOME


def test_a_longer_trip_asks_for_more_levels():
    levels = [Offer(drafter="m", step_s=0.015, round_trip_s=trip).levels for trip in (0.0, 0.01, 0.05, 1.0)]
    assert levels == [1, 2, 4, 4]

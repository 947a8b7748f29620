"""A swarm of toy stages in this process: requests go on, token for token, whatever is lost on the way."""

import random
import time
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from membership_keys import NOW_S, invite, key
from memory_members import Node, settled
from swarms import TEST_MODEL
from toy import VOCAB, plain_text
from toy_drafts import TREE, drafter
from toy_model import ToyDrafter, ToySpanModel

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.coordination.for_others import CoordinatorService, ThinClient
from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.errors import CoverageLost, PeerDisconnected
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.peers.membership import Load
from dsd_p2p.peers.services import run_services
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.stage import refill
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import Sampling, Span, TextRequest
from dsd_p2p.verification.exact import ExactSession, ExactVerifier
from dsd_p2p.window.static import PLAIN, StaticPolicy
from dsd_p2p.wire import messages
from dsd_p2p.wire.membership import MemberState, PeerProfile, Role

INTERVAL_S = 0.25
NUM_LAYERS = 3
PROMPT = [1, 2, 3, 4, 5]
RETRY = RetryPolicy(max_attempts=8, first_delay_s=0.05, max_delay_s=0.5)
SHORT = RetryPolicy(max_attempts=2, first_delay_s=0.05)
"""For what cannot come back: each attempt waits for coverage for 5 s."""
LINK = LinkModel(latency_s=0.004)


class ToyNode(Node):
    """A member with a toy stage, an engine and a coordinator's service."""

    def __init__(self, network, number, *, span=None, role=Role.STAGE, limits=None):
        grants = invite(role=role, max_uses=50, expires_at_s=NOW_S + 10**8).admit(key(number).public)
        super().__init__(
            network, number, span=span, grants=grants, bootstrap=() if number == 1 else (1,), interval_s=INTERVAL_S
        )
        self.role = role
        self.limits = limits or StageLimits(dials_routes=False)
        self.model = ToySpanModel(span, NUM_LAYERS) if span else None

    def info(self, span=None):
        from msgspec.structs import replace

        return replace(super().info(span), num_layers=NUM_LAYERS if self.span else 0)

    async def run(self, *, task_status=trio.TASK_STATUS_IGNORED):
        with self.scope:
            async with (
                self.network.open(self.peer) as inner,
                emulate(inner, LINK, random.Random(1)) as transport,
                trio.open_nursery() as nursery,
            ):
                self.join(transport, lambda: Load(num_sessions=self.server.num_sessions))
                self.server = StageServer(self.links, self.model, self.limits, time.perf_counter)
                self.directory = SwarmDirectory(
                    self.membership, model=TEST_MODEL, num_layers=NUM_LAYERS, coverage_timeout_s=5
                )
                toy = ToyDrafter(drafter(0.8, random.Random(self.peer)))
                self.engine = Engine(self.links, toy, VOCAB, nursery, self.directory)
                self.coordinators = []
                self.thin = ThinClient(self.links, self.next_coordinator)
                coordination = CoordinatorService(self.engine, lambda: StaticPolicy(TREE))
                services = [self.membership, self.server, self.engine, self.thin, coordination]
                nursery.start_soon(run_services, self.links, services)
                await trio.testing.wait_all_tasks_blocked()
                profile = PeerProfile(
                    layer_us=1000, layer16_us=1500, max_layers=0 if self.role is Role.CLIENT else NUM_LAYERS
                )
                await self.membership.announce(self.info(), MemberState.SERVING, profile)
                task_status.started(self)
                await trio.sleep_forever()

    def next_coordinator(self, avoid):
        return next((peer for peer in self.coordinators if peer not in avoid and self.links.is_connected(peer)), None)


@asynccontextmanager
async def toy_swarm(*spans, **options):
    """Stages 1, 2, … and a client."""
    network = MemoryNetwork()
    async with trio.open_nursery() as nursery:
        nodes = [
            await nursery.start(ToyNode(network, number, span=span, **options).run)
            for number, span in enumerate(spans, start=1)
        ]
        client = await nursery.start(ToyNode(network, 40, role=Role.CLIENT).run)
        await settled([*nodes, client])
        yield network, nursery, nodes, client
        nursery.cancel_scope.cancel()


async def write(client, num_tokens, decision=TREE, after=None, sampling=None, retry=RETRY):
    """Return the tokens and statistics; `after` maps a number of tokens to what is done once so many have come."""
    options = GenerateOptions(
        text=TextRequest(max_tokens=num_tokens, sampling=sampling or Sampling()), stall_timeout_s=5, retry=retry
    )
    after = dict(after or {})
    tokens = []
    with trio.fail_after(60):
        async with client.engine.generate(PROMPT, options, StaticPolicy(decision)) as generation:
            async for token in generation:
                tokens.append(token)
                if (action := after.pop(len(tokens), None)) is not None:
                    action()
    assert not after
    return tokens, generation.stats


async def all_free(nodes):
    with trio.fail_after(10):
        while any(node.server.num_sessions or node.model.num_caches for node in nodes):  # noqa: ASYNC110 - many
            await trio.sleep(0.02)


SPANS = [Span(0, 1), Span(1, 2), Span(2, 3), Span(0, 1), Span(1, 2), Span(2, 3)]


async def used(client):
    return [hop.peer for hop in (await client.directory.find()).hops]


@pytest.mark.parametrize("decision", [PLAIN, TREE], ids=["plain", "tree"])
@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_killed_stage_costs_only_what_it_held(decision, position, monkeypatch):
    # Refills of more than one window.
    for module in (messages, refill):
        monkeypatch.setattr(module, "FILL_NODES", 4)
    async with toy_swarm(*SPANS) as (_, _, nodes, client):
        by_peer = {node.peer: node for node in nodes}
        chain = await used(client)
        victim = by_peer[chain[position]]
        kept = [by_peer[peer] for index, peer in enumerate(chain) if index != position]
        monkeypatch.setattr("dsd_p2p.session.flight.FILL_NODES", 4)
        num_caches = {}

        def kill():
            num_caches.update({node.peer: node.model.num_opened for node in kept})
            victim.scope.cancel()

        tokens, stats = await write(client, 60, decision, {20: kill})
        assert tokens == plain_text(PROMPT, 60)
        assert (stats.num_replays, stats.num_resumes) == (1, 1)
        # Those that are left have opened no second cache: they went on with theirs.
        assert {node.peer: node.model.num_opened for node in kept} == num_caches
        await all_free([node for node in nodes if node is not victim])


class SeenTexts:
    """Verifiers of a swarm's tails that note what they are told of each text."""

    def __init__(self, num_prompt):
        self.num_prompt = num_prompt
        self.sessions = []

    def choose(self, text, _grammars):
        exact, seen = ExactVerifier(text.sampling), self

        class Session(ExactSession):
            def __init__(self, num_prompt):
                super().__init__(exact, num_prompt)
                self.written = []
                seen.sessions.append(self)

            def accept(self, token):
                super().accept(token)
                self.written.append(token)

            def rewind(self, length):
                super().rewind(length)
                del self.written[length - seen.num_prompt :]

        return SimpleNamespace(open=Session)


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_verifier_knows_the_text_whoever_is_lost(position, monkeypatch):
    """A tail that goes on hands its verifier over; a new one is told what was written, also by a refill."""
    seen = SeenTexts(len(PROMPT))
    monkeypatch.setattr("dsd_p2p.stage.server.choose_verifier", seen.choose)
    async with toy_swarm(*SPANS) as (_, _, nodes, client):
        victim = {node.peer: node for node in nodes}[(await used(client))[position]]
        tokens, stats = await write(client, 60, TREE, {20: victim.scope.cancel})
        assert stats.num_resumes == 1
        expected = plain_text(PROMPT, 60)
        assert tokens == expected
        for session in seen.sessions:
            assert session.written == expected[: len(session.written)]
        num_whole = sum(len(session.written) == 60 for session in seen.sessions)
        num_part = sum(0 < len(session.written) < 60 for session in seen.sessions)
        assert (num_whole, num_part) == (1, int(position == 2))


async def test_all_stages_die_one_after_another():
    async with toy_swarm(*SPANS) as (_, _, nodes, client):
        by_peer = {node.peer: node for node in nodes}
        chain = [by_peer[peer] for peer in await used(client)]
        kills = {15 * (index + 1): node.scope.cancel for index, node in enumerate(chain)}
        tokens, stats = await write(client, 80, TREE, kills, Sampling(temperature=0.8, seed=4))
        again, _ = await write(client, 80, PLAIN, None, Sampling(temperature=0.8, seed=4))
        assert tokens == again
        assert stats.num_replays >= 3
        await all_free([node for node in nodes if node not in chain])


async def test_a_cut_between_two_stages_is_routed_around():
    """Both reach the client, only not each other: heartbeats and the stage's own words name the link."""
    async with toy_swarm(*SPANS) as (network, _, nodes, client):
        chain = await used(client)
        a, b = chain[0], chain[1]

        def cut():
            for one, other in ((a, b), (b, a)):
                transport = network.transports[one]
                original = transport.send

                async def send(to, frame, original=original, other=other):
                    if to == other:
                        raise PeerDisconnected("the link is cut")
                    await original(to, frame)

                transport.send = send

        tokens, stats = await write(client, 60, TREE, {15: cut})
        assert tokens == plain_text(PROMPT, 60)
        assert stats.num_replays >= 1
        await all_free(nodes)


async def test_lost_coverage_is_a_typed_error_that_names_the_layers():
    async with toy_swarm(Span(0, 1), Span(1, 2), Span(2, 3)) as (_, _, nodes, client):
        with pytest.raises(CoverageLost, match=r"\[1, 2\)"):
            await write(client, 60, TREE, {10: nodes[1].scope.cancel}, retry=SHORT)
        await all_free([nodes[0], nodes[2]])


async def test_a_gap_that_closes_in_time_is_only_a_pause():
    async with toy_swarm(Span(0, 1), Span(1, 2), Span(2, 3)) as (network, nursery, nodes, client):
        back = ToyNode(network, 2, span=Span(1, 2))

        async def come_back():
            await trio.sleep(1)
            await nursery.start(back.run)

        def restart():
            nodes[1].scope.cancel()
            nursery.start_soon(come_back)

        tokens, stats = await write(client, 60, TREE, {10: restart})
        assert tokens == plain_text(PROMPT, 60)
        assert stats.num_resumes == 1
        await all_free([nodes[0], nodes[2], back])


async def test_what_waits_for_another_route_is_freed_when_none_comes():
    limits = StageLimits(dials_routes=False, orphan_s=0.5)
    async with toy_swarm(Span(0, 1), Span(1, 2), Span(2, 3), limits=limits) as (_, _, nodes, client):
        with pytest.raises(CoverageLost):
            await write(client, 60, TREE, {10: nodes[2].scope.cancel}, retry=SHORT)
        await all_free(nodes[:2])


async def thin_write(client, num_tokens, after=None, sampling=None):
    options = GenerateOptions(
        text=TextRequest(max_tokens=num_tokens, sampling=sampling or Sampling()), stall_timeout_s=5
    )
    after, tokens = dict(after or {}), []
    with trio.fail_after(60):
        async with aclosing(client.thin.generate(PROMPT, options, 60)) as answer:
            async for piece in answer:
                for token in piece.tokens:
                    tokens.append(token)
                    if (action := after.pop(len(tokens), None)) is not None:
                        action()
    return tokens


async def test_a_thin_client_streams_from_a_coordinator_that_is_a_stage_itself():
    async with toy_swarm(*SPANS[:3]) as (_, _, nodes, client):
        for node in nodes:
            client.coordinators = [node.peer]
            assert await thin_write(client, 40) == plain_text(PROMPT, 40)
        await all_free(nodes)


async def test_a_lost_coordinator_is_taken_over_from_what_was_received():
    sampling = Sampling(temperature=1.0, seed=9)
    async with toy_swarm(*SPANS) as (network, nursery, nodes, client):
        coordinators = [await nursery.start(ToyNode(network, number).run) for number in (50, 51, 52)]
        await settled([*nodes, client, *coordinators])
        client.coordinators = [node.peer for node in coordinators]
        expected, _ = await write(client, 60, PLAIN, None, sampling)
        kills = {10: coordinators[0].scope.cancel, 30: coordinators[1].scope.cancel}
        assert await thin_write(client, 60, kills, sampling) == expected
        client.coordinators = []
        with pytest.raises(CoverageLost, match="coordinates"):
            await thin_write(client, 5)
        await all_free(nodes)


async def test_the_next_turn_of_a_thin_client_is_not_computed_from_its_start():
    rows = 0

    async with toy_swarm(*SPANS[:3]) as (_, _, nodes, client):
        client.coordinators = [nodes[1].peer]
        run = nodes[0].model.run

        def counted(passes):
            nonlocal rows
            rows += sum(each.num_rows for each in passes)
            return run(passes)

        nodes[0].model.run = counted

        async def turn(owner, prompt):
            nonlocal rows
            options, rows = GenerateOptions(text=TextRequest(max_tokens=1), stall_timeout_s=5, owner=owner), 0
            async with aclosing(client.thin.generate(prompt, options, 60)) as answer:
                tokens = [token async for piece in answer for token in piece.tokens]
            assert tokens == plain_text(prompt, 1)
            while any(node.server.num_sessions for node in nodes):  # noqa: ASYNC110 - many
                await trio.sleep(0.01)
            return rows

        long = [1, 2, 3] * 40
        assert await turn("alice", long) == len(long)
        assert await turn("alice", [*long, 4, 5]) <= 3
        assert await turn("bob", [*long, 4, 5]) == len(long) + 2, "nobody else's is used"


async def test_a_stage_lost_in_a_later_turn_costs_no_token():
    async with toy_swarm(*SPANS) as (_, _, nodes, client):
        prompt, owned = [1, 2, 3] * 10, {"owner": "alice", "stall_timeout_s": 5, "retry": RETRY}
        for number in range(2):
            options, tokens = GenerateOptions(text=TextRequest(max_tokens=60), **owned), []
            with trio.fail_after(60):
                async with client.engine.generate(prompt, options, StaticPolicy(TREE)) as generation:
                    async for token in generation:
                        tokens.append(token)
                        if number and len(tokens) == 20:
                            (middle,) = [node for node in nodes if node.peer == generation.machine.route.hops[1].peer]
                            middle.scope.cancel()
            assert tokens == plain_text(prompt, 60)
            assert generation.stats.num_replays == number
            prompt = [*prompt, *tokens, 5]


async def test_a_reader_that_leaves_frees_the_chain():
    async with toy_swarm(*SPANS[:3]) as (_, _, nodes, client):
        client.coordinators = [nodes[0].peer]
        options = GenerateOptions(text=TextRequest(max_tokens=900), stall_timeout_s=5)
        async with aclosing(client.thin.generate(PROMPT, options, 60)) as answer:
            async for _ in answer:
                break
        await all_free(nodes)


async def test_draining_takes_nothing_new_and_lets_the_old_end():
    async with toy_swarm(*SPANS) as (_, nursery, nodes, client):
        by_peer = {node.peer: node for node in nodes}
        chain = [by_peer[peer] for peer in await used(client)]
        drained = trio.Event()

        async def drain():
            await chain[1].server.drain(20)
            drained.set()

        tokens, stats = await write(client, 60, TREE, {10: lambda: nursery.start_soon(drain)})
        assert tokens == plain_text(PROMPT, 60)
        assert stats.num_replays == 0
        with trio.fail_after(5):
            await drained.wait()
        tokens, stats = await write(client, 20, retry=SHORT)
        assert tokens == plain_text(PROMPT, 20)
        assert chain[1].server.num_sessions == 0

"""Stages that lie: each kind is caught within 32 windows, named, and left out of the next chain; honest ones are never accused."""

import time
from contextlib import asynccontextmanager

import numpy as np
import pytest
import reference
import trio
from families import NUM_LAYERS, VOCAB
from membership_keys import key
from msgspec.structs import replace
from swarms import TEST_MODEL

from dsd_p2p.coordination.directory import StageList
from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.coordination.signed import SignedWindows
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.errors import DishonestPeer
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.services import run_services
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import PeerInfo, Sampling, Span, TextRequest
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree
from dsd_p2p.wire.messages import Hop, Verdict, Window

SPANS = [Span(0, 1), Span(1, 3), Span(3, 4)]
CHAIN = continuous_tree(depth=8, width=1, window_nodes=2, max_in_flight=3)
TREE = continuous_tree(depth=8, width=2, window_nodes=4, max_in_flight=3)
PROMPT = [5, 9, 2, 77, 31]
NUM_TOKENS = 120


class Liar:
    """A span model whose results are bent by `bend(rows, previous rows)`; it lies from the `start`-th pass on."""

    def __init__(self, model, bend, start, like):
        self.model, self.bend, self.start = model, bend, start
        self.is_head, self.is_tail, self.row_bytes = like.is_head, like.is_tail, like.row_bytes
        self.num_passes = 0
        self.grammars = None
        self.last = b""

    def narrow(self, span):
        return self

    def new_cache(self, max_slots):
        return self.model.new_cache(max_slots)

    def run(self, passes):
        return [self.bent(output) for output in self.model.run(passes)]

    def bent(self, output):
        self.num_passes += 1
        is_lying = self.num_passes > self.start
        if not isinstance(output, bytes):
            return [WrongView(view) for view in output] if is_lying else output
        bent = self.bend(output, self.last) if is_lying else output
        self.last = output
        return bent


class WrongView:
    def __init__(self, view):
        self.view = view

    def argmax(self):
        return (self.view.argmax() + 1) % VOCAB

    def logits(self):
        return np.roll(self.view.logits(), 1)


def noise(rows, _last):
    values = np.frombuffer(rows, np.float32)
    return (values + np.random.default_rng(0).normal(0, 0.05, len(values)).astype(np.float32)).tobytes()


def zeros(rows, _last):
    return bytes(len(rows))


def replay(rows, last):
    return (last * 8)[: len(rows)] if last else rows


def scaled(rows, _last):
    return (np.frombuffer(rows, np.float32) * np.float32(1.01)).tobytes()


@asynccontextmanager
async def stages(tiny, bend=None, liar=1, num_replicas=2, start=3, liar_span=None):
    """Three stages, each `num_replicas` times; number `liar` bends its results, or computes another span."""
    source = find_model(str(tiny("llama")), NoProgress())
    network = MemoryNetwork()
    peers = [key(10 * copy + index) for copy in range(1, num_replicas + 1) for index in range(3)]
    async with trio.open_nursery() as nursery:
        for number, peer in enumerate(peers):
            index = number % 3
            model = open_span(source, SPANS[index])
            served = model
            if number == liar and (bend or liar_span):
                lying = open_span(source, liar_span) if liar_span else model
                served = Liar(lying, bend or (lambda rows, _last: rows), start, like=model)
            await nursery.start(serve, network, peer, served, SPANS[index])
        me = key(200)
        async with network.open(me.peer) as transport:
            links = PeerLinks(transport, PeerInfo(peer=me.peer, addresses=transport.addresses))
            listed = StageList(links)
            drafter = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
            engine = Engine(links, drafter, VOCAB, nursery, listed)
            nursery.start_soon(run_services, links, [engine])
            await listed.add([f"memory:{peer.peer}" for peer in peers])
            yield engine, network, peers
            nursery.cancel_scope.cancel()


async def serve(network, peer, model, span, task_status=trio.TASK_STATUS_IGNORED):
    async with network.open(peer.peer) as transport:
        me = PeerInfo(
            peer=peer.peer,
            addresses=transport.addresses,
            span=span,
            num_layers=NUM_LAYERS,
            model_name="tiny",
            model=TEST_MODEL,
            max_positions=1024,
        )
        links = PeerLinks(transport, me)
        server = StageServer(links, model, StageLimits(), time.perf_counter, sign=peer.sign)
        task_status.started()
        await run_services(links, [server])


async def write(engine, decision=CHAIN, sampling=None):
    options = GenerateOptions(text=TextRequest(max_tokens=NUM_TOKENS, sampling=sampling or Sampling()), audit=True)
    with trio.fail_after(120):
        async with engine.generate(PROMPT, options, StaticPolicy(decision)) as generation:
            try:
                tokens = [token async for token in generation]
            except DishonestPeer as exc:
                return exc, generation
    return tokens, generation


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decision", [PLAIN, CHAIN, TREE], ids=["plain", "chain", "tree"])
async def test_honest_stages_are_checked_and_never_accused(tiny, decision, sampling):
    async with stages(tiny) as (engine, _, _):
        tokens, generation = await write(engine, decision, sampling)
        if sampling.is_greedy:
            assert tokens == reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS)
        assert len(tokens) == NUM_TOKENS
        checks = generation.driver.checks
        assert checks.num_checks >= 3
        assert checks.num_unchecked == 0
        assert all(position > len(PROMPT) for position in checks.checked)
        assert engine.trust.distrusted == {}


# A tail's lie is a wrong pick, however it comes about: one way is enough.
LIES = [*((liar, bend) for liar in (0, 1) for bend in (noise, zeros, replay, scaled)), (2, noise)]


@pytest.mark.parametrize(("liar", "bend"), LIES, ids=[f"{['head', 'middle', 'tail'][n]}-{b.__name__}" for n, b in LIES])
async def test_a_liar_is_caught_named_and_routed_around(tiny, bend, liar, caplog):
    async with stages(tiny, bend, liar) as (engine, _, peers):
        error, generation = await write(engine)
        assert isinstance(error, DishonestPeer)
        assert error.peer == peers[liar].peer
        assert peers[liar].peer in str(error)
        # The first three windows are honest.
        assert generation.stats.num_windows <= 3 + 32
        assert any(peers[liar].peer in record.getMessage() for record in caplog.records if record.levelname == "ERROR")
        tokens, _ = await write(engine)
        assert tokens == reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS)


async def test_wrong_layers_are_a_lie(tiny):
    """The right shapes, the right hashes, other weights."""
    async with stages(tiny, liar=1, liar_span=Span(0, 2)) as (engine, _, peers):
        error, _ = await write(engine)
        assert isinstance(error, DishonestPeer)
        assert error.peer == peers[1].peer


def tamper(network, peer, change):
    """Let a peer's windows be changed on their way out."""
    from dsd_p2p.wire.codec import decode, encode

    transport = network.transports[peer]
    original = transport.send

    async def send(to, frame):
        message, payload = decode(frame)
        if isinstance(message, Window) and message.window > 3:
            message, payload = change(message, bytes(payload))
            frame = encode(message, payload)
        await original(to, frame)

    transport.send = send


@pytest.mark.parametrize(
    "change",
    [
        lambda m, p: (m, bytes(len(p))),
        lambda m, p: (replace(m, attestations=()), p),
        lambda m, p: (
            replace(m, attestations=(*m.attestations[:-1], replace(m.attestations[-1], signature=bytes(64)))),
            p,
        ),
        lambda m, p: (
            replace(m, attestations=(*m.attestations[:-1], replace(m.attestations[-1], outputs=bytes(16)))),
            p,
        ),
        lambda m, p: (replace(m, attestations=m.attestations * 2), p),
    ],
    ids=["changed-after-signing", "unsigned", "forged", "other-outputs", "twice"],
)
async def test_a_broken_chain_of_signatures_is_caught_before_it_counts(tiny, change):
    async with stages(tiny) as (engine, network, peers):
        tamper(network, peers[1].peer, change)
        tokens, generation = await write(engine)
        assert tokens == reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS)
        assert generation.stats.num_replays >= 1
        # Neighbours contradict each other: the chain goes around one of them, and nobody else is ever named.
        assert set(engine.trust.distrusted) <= {peers[1].peer, peers[2].peer}


async def test_a_stage_that_does_not_show_what_it_computed_is_named(tiny, monkeypatch):
    monkeypatch.setattr("dsd_p2p.coordination.trust._ASK_TIMEOUT_S", 0.5)
    async with stages(tiny) as (engine, network, peers):
        transport = network.transports[peers[1].peer]
        original = transport.send

        async def send(to, frame):
            from dsd_p2p.wire.codec import decode
            from dsd_p2p.wire.messages import Revealed

            if not isinstance(decode(frame).message, Revealed):
                await original(to, frame)

        transport.send = send
        error, _ = await write(engine)
        assert isinstance(error, DishonestPeer)
        assert error.peer == peers[1].peer


async def test_a_lying_replica_does_not_get_an_honest_stage_blamed(tiny):
    """Of two replicas one lies when it is asked to check: the other, and the stage, outvote it."""
    async with stages(tiny, noise, liar=4, num_replicas=3, start=0) as (engine, _, peers):
        error, _ = await write(engine)
        assert isinstance(error, DishonestPeer)
        assert error.peer == peers[4].peer


async def test_without_replicas_nothing_is_claimed(tiny):
    async with stages(tiny, num_replicas=1) as (engine, _, _):
        tokens, generation = await write(engine)
        assert len(tokens) == NUM_TOKENS
        assert generation.driver.checks.num_checks == 0
        assert generation.driver.checks.num_unchecked > 0


def test_a_verdict_on_a_window_that_was_not_sent_is_a_lie():
    hops = (Hop(peer="tail", address="memory:tail", span=Span(0, 2)),)
    window = Window(
        session=bytes(16), epoch=3, window=7, root=(0, -1), first_node=0, tokens=(1,), parents=(-1,), positions=(0,)
    )
    signed = SignedWindows(hops)
    verdict = Verdict(session=bytes(16), epoch=3, window=9, start_pos=1, tokens=(5,), settled=(-1,))
    signed.heard(verdict)
    signed.sent(window, 0)
    with pytest.raises(DishonestPeer, match="window 9, which was not sent"):
        signed.heard(verdict)
    with pytest.raises(DishonestPeer, match="lacks the stages' signatures"):
        signed.heard(replace(verdict, window=7))
    # It answers a window of the route before.
    signed.heard(replace(verdict, epoch=2))

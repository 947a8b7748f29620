"""Stages that lie: each kind is caught before its answer ends and left out afterwards; honest ones are never accused."""

from contextlib import asynccontextmanager

import pytest
import reference
import trio
from families import NUM_LAYERS
from msgspec.structs import replace

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.coordination.signed import SignedWindows
from dsd_p2p.coordination.tolerance import first_wrong_pick, tolerance_of
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.errors import AuditIncomplete, ConfigError, DishonestPeer, PeerError
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Sampling, Span, TextRequest
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree
from dsd_p2p.wire.messages import Hop, Verdict, Window
from node.lab.audited.lies import LIES, Lie, changed_copies
from node.lab.audited.swarm import audited_swarm

SPANS = [Span(0, 1), Span(1, 3), Span(3, 4)]
HEAD, MIDDLE, TAIL = range(3)
CHAIN = continuous_tree(depth=8, width=1, window_nodes=2, max_in_flight=3)
TREE = continuous_tree(depth=8, width=2, window_nodes=4, max_in_flight=3)
PROMPT = [5, 9, 2, 77, 31]
SAMPLED = Sampling(temperature=0.8, seed=1, top_p=0.9)
NUM_TOKENS = 40
BY_NAME = {lie.name: lie for lie in LIES}


@asynccontextmanager
async def swarm_of(tiny, dtype="float32", num_replicas=3, copies=None):
    source = find_model(str(tiny("llama")), NoProgress())
    drafter = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
    async with audited_swarm(source, SPANS, drafter, dtype=dtype, num_replicas=num_replicas, copies=copies) as swarm:
        yield swarm


async def write(swarm, decision=CHAIN, sampling=None, num_tokens=NUM_TOKENS):
    """Return the tokens, the error that ended the answer or None, and the generation."""
    options = GenerateOptions(text=TextRequest(max_tokens=num_tokens, sampling=sampling or Sampling()), audit=True)
    tokens = []
    with trio.fail_after(120):
        async with swarm.engine.generate(PROMPT, options, StaticPolicy(decision)) as generation:
            try:
                async for token in generation:
                    tokens.append(token)
            except PeerError as exc:
                return tokens, exc, generation
    return tokens, None, generation


def caught(swarm):
    return {index for index, stage in enumerate(swarm.stages) if stage.key.peer in swarm.engine.trust.distrusted}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_honest_stages_are_checked_to_the_end_and_never_accused(tiny, dtype):
    async with swarm_of(tiny, dtype) as swarm:
        for decision in (PLAIN, CHAIN, TREE):
            for sampling in (Sampling(), SAMPLED):
                tokens, error, generation = await write(swarm, decision, sampling)
                assert error is None
                if sampling.is_greedy and dtype == "float32":
                    assert tokens == reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS)
                checks = generation.driver.checks
                assert (checks.num_checks >= 3, checks.num_unchecked) == (True, 0)
                assert min(checks.checked) >= len(PROMPT) + len(tokens) - 1
        # A very short answer is no exception.
        _, error, generation = await write(swarm, num_tokens=2)
        assert (error, min(generation.driver.checks.checked)) == (None, len(PROMPT) + 1)
        assert swarm.engine.trust.distrusted == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_every_lie_is_caught_before_its_answer_ends(tiny, dtype, monkeypatch):
    monkeypatch.setattr("dsd_p2p.coordination.trust._ASK_TIMEOUT_S", 1)
    right = reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS)
    with changed_copies(find_model(str(tiny("llama")), NoProgress())) as copies:
        async with swarm_of(tiny, dtype, copies=copies) as swarm:
            for lie in LIES:
                for liar in (TAIL,) if lie.needs_tail else (MIDDLE,) if lie.skips else (HEAD, MIDDLE):
                    swarm.stages[liar].model.lie = lie
                    tokens, error, _ = await write(swarm, sampling=SAMPLED if lie.is_sampled else None)
                    if error is None:
                        # It was caught before its verdict counted, and the text went another way.
                        assert dtype != "float32" or tokens == right, lie.name
                        assert lie.sends is not None, lie.name
                    else:
                        # Silence may be the network's fault: the peer is avoided for a while, but not called a liar.
                        kind = AuditIncomplete if lie.name == "silent stage" else DishonestPeer
                        assert isinstance(error, kind), (lie.name, error)
                        assert error.peer == swarm.stages[liar].key.peer, (lie.name, error)
                        assert caught(swarm) == {liar}, lie.name
                    swarm.honest()


async def test_who_was_caught_is_left_out_and_said(tiny, caplog):
    async with swarm_of(tiny) as swarm:
        swarm.stages[MIDDLE].model.lie = BY_NAME["noise"]
        await write(swarm)
        peer = swarm.stages[MIDDLE].key.peer
        assert any(peer in record.getMessage() for record in caplog.records if record.levelname == "ERROR")
        tokens, error, _ = await write(swarm)
        assert (tokens, error) == (reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS), None)


def late(change):
    """Return a change of windows that begins after the third."""
    return lambda message: change(message) if isinstance(message, Window) and message.window > 3 else message


def signed(message, **changes):
    *before, mine = message.attestations
    return replace(message, attestations=(*before, replace(mine, **changes)))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, attestations=()),
        lambda m: signed(m, signature=bytes(64)),
        lambda m: signed(m, outputs=bytes(16)),
        lambda m: replace(m, attestations=m.attestations * 2),
    ],
    ids=["unsigned", "forged", "other-outputs", "twice"],
)
async def test_a_broken_chain_of_signatures_is_caught_before_it_counts(tiny, change):
    async with swarm_of(tiny) as swarm:
        swarm.stages[MIDDLE].model.lie = Lie(name="signatures", sends=late(change))
        tokens, error, generation = await write(swarm)
        assert (tokens, error) == (reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS), None)
        assert generation.stats.num_replays >= 1
        # Neighbours contradict each other: the chain goes around one of them, and nobody else is ever named.
        assert caught(swarm) <= {MIDDLE, TAIL}


async def test_a_lying_replica_does_not_get_an_honest_stage_blamed(tiny):
    """Of two replicas one lies when it is asked to check: the other, and the stage, outvote it."""
    async with swarm_of(tiny) as swarm:
        replica = len(SPANS) + MIDDLE
        swarm.stages[replica].model.lie = BY_NAME["zeros"]
        _, error, _ = await write(swarm)
        assert isinstance(error, DishonestPeer)
        assert caught(swarm) == {replica}


async def test_two_of_one_invite_cannot_vouch_for_each_other(tiny):
    with changed_copies(find_model(str(tiny("llama")), NoProgress())) as copies:
        async with swarm_of(tiny, copies=copies, num_replicas=4) as swarm:
            liar, accomplice = swarm.stages[MIDDLE], swarm.stages[len(SPANS) + MIDDLE]
            liar.model.lie = accomplice.model.lie = BY_NAME["8-bit weights"]
            swarm.directory.same = {liar.key.peer: "invite", accomplice.key.peer: "invite"}
            _, error, _ = await write(swarm)
            assert isinstance(error, DishonestPeer)
            assert caught(swarm) == {MIDDLE}


async def test_one_word_against_another_names_nobody(tiny):
    async with swarm_of(tiny, num_replicas=2) as swarm:
        swarm.stages[MIDDLE].model.lie = BY_NAME["noise"]
        _, error, _ = await write(swarm)
        assert isinstance(error, AuditIncomplete)
        assert "no third peer" in str(error)
        assert caught(swarm) == set()


async def test_what_nobody_can_check_is_refused(tiny, monkeypatch):
    async with swarm_of(tiny, num_replicas=1) as swarm:
        with pytest.raises(AuditIncomplete, match="an audit needs a second peer"):
            await write(swarm)
    async with swarm_of(tiny, num_replicas=2) as swarm:
        monkeypatch.setattr("dsd_p2p.coordination.engine.MAX_RECOMPUTED", 100)
        with pytest.raises(ConfigError, match="an audited text has at most 100 tokens"):
            await write(swarm, num_tokens=96)


async def test_a_text_whose_rows_fit_into_no_frame_says_so(tiny, monkeypatch):
    monkeypatch.setattr("dsd_p2p.wire.codec.MAX_FRAME_BYTES", 9000)
    monkeypatch.setattr("dsd_p2p.coordination.audit._PIECE_BYTES", 4096)
    async with swarm_of(tiny) as swarm:
        _, error, _ = await write(swarm)
        assert isinstance(error, AuditIncomplete)
        assert "does not fit into a frame" in str(error)
        assert caught(swarm) == set()


async def test_an_answer_whose_replicas_left_is_not_called_checked(tiny):
    async with swarm_of(tiny, num_replicas=2) as swarm:
        replicas = swarm.engine.trust._directory.replicas
        num_asked = 0

        def leaving(span, but):
            nonlocal num_asked
            num_asked += 1
            return replicas(span, but) if num_asked <= len(SPANS) else []

        swarm.directory.replicas = leaving
        tokens, error, _ = await write(swarm)
        assert len(tokens) == NUM_TOKENS
        assert isinstance(error, AuditIncomplete)
        assert "no peer with these layers" in str(error)


async def test_a_lost_route_does_not_end_the_audit(tiny):
    """A stage is lost in the middle; the liar of the route that follows is caught all the same."""
    async with swarm_of(tiny) as swarm:
        liar = len(SPANS) + HEAD

        def once(message):
            if isinstance(message, Window) and message.window > 3:
                swarm.stages[HEAD].model.lie = None
                swarm.stages[liar].model.lie = BY_NAME["noise"]
                return replace(message, attestations=())
            return message

        swarm.stages[HEAD].model.lie = Lie(name="leaves", sends=once)
        _, error, generation = await write(swarm)
        assert generation.stats.num_replays >= 1
        assert isinstance(error, DishonestPeer) == (caught(swarm) == {liar})
        if error is None:
            assert generation.driver.checks.is_whole, "the route that followed had another head"


async def test_two_audited_answers_at_once_do_not_refuse_each_other(tiny):
    async with swarm_of(tiny) as swarm, trio.open_nursery() as nursery:
        errors = []

        async def one():
            errors.append((await write(swarm))[1])

        for _ in range(3):
            nursery.start_soon(one)
        with trio.fail_after(100):
            while len(errors) < 3:  # noqa: ASYNC110 - three tasks
                await trio.sleep(0.1)
        assert errors == [None] * 3


async def test_a_tail_that_spoils_a_signature_gets_nobody_else_banned(tiny):
    def spoiled(message):
        if not isinstance(message, Verdict) or not message.attestations:
            return message
        first = message.attestations[0]
        head = replace(first.stages[0], signature=bytes(64))
        bad = replace(first, stages=(head, *first.stages[1:]))
        return replace(message, attestations=(bad, *message.attestations[1:]))

    async with swarm_of(tiny) as swarm:
        swarm.stages[TAIL].model.lie = Lie(name="spoils", sends=spoiled)
        tokens, error, _ = await write(swarm)
        assert (tokens, error) == (reference.greedy(tiny("llama"), PROMPT, NUM_TOKENS), None)
        assert caught(swarm) == {TAIL}


async def test_a_long_prompt_in_half_precision_accuses_nobody(tiny):
    async with swarm_of(tiny, "bfloat16") as swarm:
        options = GenerateOptions(text=TextRequest(max_tokens=8), audit=True)
        prompt = [3 + number * 7 % 90 for number in range(90)]
        with trio.fail_after(60):
            async with swarm.engine.generate(prompt, options, StaticPolicy(CHAIN)) as generation:
                assert len([token async for token in generation]) == 8
        assert generation.driver.checks.is_whole
        assert swarm.engine.trust.distrusted == {}


@pytest.mark.parametrize("gaps", [[62], [0, 125, 0, 0], [0, 0, 0, 250, 0, 0, 0]])
def test_one_near_tie_in_half_precision_is_no_lie(gaps):
    assert first_wrong_pick(gaps, tolerance_of("bfloat16")) is None
    assert first_wrong_pick([*gaps, 2000], tolerance_of("bfloat16")) == len(gaps)
    assert first_wrong_pick([300] * 8, tolerance_of("bfloat16")) == 0


def test_a_verdict_on_a_window_that_was_not_sent_is_a_lie():
    hops = (Hop(peer="tail", address="memory:tail", span=Span(0, 2)),)
    window = Window(
        session=bytes(16), epoch=3, window=7, root=(0, -1), first_node=0, tokens=(1,), parents=(-1,), positions=(0,)
    )
    windows = SignedWindows(hops)
    verdict = Verdict(session=bytes(16), epoch=3, window=9, start_pos=1, tokens=(5,), settled=(-1,))
    windows.heard(verdict)
    windows.sent(window, 0)
    with pytest.raises(DishonestPeer, match="window 9, which was not sent"):
        windows.heard(verdict)
    with pytest.raises(DishonestPeer, match="lacks the stages' signatures"):
        windows.heard(replace(verdict, window=7))
    # It answers a window of the route before.
    windows.heard(replace(verdict, epoch=2))

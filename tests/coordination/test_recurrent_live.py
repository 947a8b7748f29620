"""Swarms of models with recurrent layers: next turns, and stages that are lost on the way."""

import pytest
import reference
import test_swarm_live
import trio
from demand import on_demand
from families import NUM_LAYERS, VOCAB
from prompting import prompt_of
from swarms import load_stages, model_swarm
from test_swarm_live import ToyNode, toy_swarm, used, write
from toy import toy_route
from toy_drafts import TREE

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.coordination.prefixes import PrefixIndex, scope_of
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.errors import DsdError
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.session.flight import FILL_NODES
from dsd_p2p.types import HiddenFormat, Sampling, Span, TextRequest
from dsd_p2p.window.static import PLAIN, StaticPolicy
from dsd_p2p.wire.messages import Prefix
from node.lab.audited.lies import LIES
from node.lab.audited.swarm import audited_swarm

FAMILY = pytest.mark.parametrize("family", ["qwen3-next", pytest.param("granite-h", marks=on_demand)])
PROMPT = prompt_of(40)


@FAMILY
async def test_a_turn_goes_on_from_the_texts_end_or_from_its_prompts(tiny, family):
    folder = tiny(family)
    source = find_model(str(folder), NoProgress())
    itself = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
    async with model_swarm(load_stages(source, 2), itself) as swarm:
        swarm.engine._prefixes = PrefixIndex(can_cut=False)

        async def turn(prompt):
            options = GenerateOptions(text=TextRequest(max_tokens=12), owner="alice")
            with trio.fail_after(60):
                async with swarm.engine.generate(prompt, options, StaticPolicy(TREE)) as generation:
                    tokens = [token async for token in generation]
            await swarm.all_closed()
            assert tokens == reference.greedy(folder, prompt, 12)
            return tokens, generation.stats

        first, stats = await turn(PROMPT)
        assert stats.num_prefix_tokens == 0
        # The same again: its state just before the prompt's last token is kept.
        _, stats = await turn(PROMPT)
        assert stats.num_prefix_tokens == len(PROMPT) - 1
        # The next turn goes on behind the answer, whose last token has been through no stage.
        _, stats = await turn([*PROMPT, *first, 5, 6, 7])
        assert stats.num_prefix_tokens == len(PROMPT) + len(first) - 1
        # Another end of the prompt: nothing can be cut out of a state.
        _, stats = await turn([*PROMPT[:30], 9, 9, 9])
        assert stats.num_prefix_tokens == 0
        assert stats.num_replays == 0, "nothing was offered that a stage refused"


def test_texts_that_cannot_be_cut_are_offered_at_two_lengths():
    route, text = toy_route(2), list(range(100))
    alice = scope_of("alice", route, HiddenFormat.MODEL)
    index = PrefixIndex(can_cut=False)
    index.add(alice, route, b"a", text[:60], 40, 0)
    assert index.find(alice, text, 0) == Prefix(session=b"a", num_tokens=60)
    assert index.find(alice, text[:50], 0) == Prefix(session=b"a", num_tokens=39)
    assert index.find(alice, text[:40], 0) == Prefix(session=b"a", num_tokens=39)
    assert index.find(alice, text[:39], 0) is None


@FAMILY
@pytest.mark.parametrize("decision", [PLAIN, TREE], ids=["plain", "tree"])
@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_killed_stage_costs_no_token(tiny, family, decision, position, monkeypatch):
    """The others keep their states, go back by the position that is taken back, and refill the new one."""
    folder = tiny(family)
    source = find_model(str(folder), NoProgress())
    made = ToyNode.__init__
    spans = [Span(0, 1), Span(1, 3), Span(3, NUM_LAYERS)]

    def with_model(self, *args, **options):
        made(self, *args, **options)
        if self.span:
            self.model = open_span(source, self.span)

    monkeypatch.setattr(ToyNode, "__init__", with_model)
    monkeypatch.setattr(test_swarm_live, "NUM_LAYERS", NUM_LAYERS)
    monkeypatch.setattr(test_swarm_live, "VOCAB", VOCAB)
    monkeypatch.setattr(test_swarm_live, "PROMPT", PROMPT)
    async with toy_swarm(*spans, *spans) as (_, _, nodes, client):
        client.engine.own_drafter.current = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
        victim = {node.peer: node for node in nodes}[(await used(client))[position]]
        sampled = Sampling(temperature=0.8, seed=4)
        tokens, stats = await write(client, 60, decision, {20: victim.scope.cancel})
        assert tokens == reference.greedy(folder, PROMPT, 60)
        assert (stats.num_replays, stats.num_resumes) == (1, 1)
        assert len(PROMPT) < FILL_NODES
        again = [(await write(client, 40, mode, None, sampled))[0] for mode in (PLAIN, TREE)]
        assert again[0] == again[1]
        with trio.fail_after(10):
            while any(node.server.num_sessions for node in nodes if node is not victim):  # noqa: ASYNC110 - of many
                await trio.sleep(0.02)
        assert not any(node.model.budget.used_bytes for node in nodes if node is not victim)


@FAMILY
async def test_an_audit_checks_recurrent_layers_too(tiny, family):
    """A replica computes in pieces what the stages computed in trees; their rows agree, and a liar's do not."""
    folder = tiny(family)
    source = find_model(str(folder), NoProgress())
    itself = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
    options = GenerateOptions(text=TextRequest(max_tokens=40), audit=True)

    async def write_audited(swarm):
        with trio.fail_after(120):
            async with swarm.engine.generate(PROMPT, options, StaticPolicy(TREE)) as generation:
                return [token async for token in generation], generation.driver.checks

    async with audited_swarm(source, [Span(0, 2), Span(2, NUM_LAYERS)], itself) as swarm:
        tokens, checks = await write_audited(swarm)
        assert tokens == reference.greedy(folder, PROMPT, 40)
        assert (checks.num_unchecked, not swarm.engine.trust.distrusted) == (0, True)
        assert min(checks.checked) >= len(PROMPT) + 39
        for stage in swarm.stages:
            stage.model.lie = LIES[0]
        with pytest.raises(DsdError):
            await write_audited(swarm)

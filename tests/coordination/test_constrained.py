"""Constrained text is one text: in every mode, with every drafter, split anywhere, sampled, after losses and turns."""

import json

import numpy as np
import pytest
import trio
from families import NUM_LAYERS, VOCAB, save_tiny_model
from letters import EOS, read, save_letters, spelled
from prompting import DECISIONS
from swarms import load_stages, model_swarm
from test_audit import swarm_of
from test_swarm_live import SPANS, ToyNode, all_free, toy_swarm, used
from toy_drafts import TREE

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.drafting.combined import CombinedDrafter
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import ConfigError, DsdError
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Constraint, ConstraintKind, Sampling, Shaping, Span, TextRequest
from dsd_p2p.window.static import PLAIN, StaticPolicy

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{3,9}$"},
        "size": {"enum": ["small", "large"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size", "legs"],
    "additionalProperties": False,
}
JSON = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA))
WORDS = Constraint(ConstraintKind.REGEX, "([a-z]{2,5} ){3,20}")
SAMPLED = Sampling(temperature=1.3, top_k=20, seed=4)
CASES = ((JSON, Sampling(), None), (JSON, SAMPLED, None), (WORDS, SAMPLED, Shaping(frequency=0.5, min_p=0.01)))
PROMPT = spelled("A cat, in JSON:")


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """Return the folder of a tiny model that writes letters."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("letters") / family
            made[family] = save_letters(save_tiny_model(family, folder))
        return made[family]

    return get


async def write(engine, decision, prompt=PROMPT, constraint=JSON, sampling=None, shaping=None, **options):
    text = TextRequest(
        max_tokens=56,
        sampling=sampling or Sampling(),
        stop_tokens=(EOS,),
        constraint=constraint,
        shaping=shaping,
    )
    with trio.fail_after(120):
        async with engine.generate(prompt, GenerateOptions(text=text, **options), StaticPolicy(decision)) as generation:
            return [token async for token in generation], generation


def is_within(grammars, constraint, tokens):
    matcher = grammars.grammar(constraint, (EOS,)).start()
    for token in tokens:
        matcher.advance(token)
    return True


@pytest.mark.parametrize(("family", "num_stages"), [("llama", 3), ("gemma3", 1)])
async def test_all_modes_and_drafters_write_the_same_constrained_text(lettered, family, num_stages):
    source = find_model(str(lettered(family)), NoProgress())
    grammars = ModelGrammars(source.folder, VOCAB)
    itself = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
    other = ModelDrafter(open_span(find_model(str(lettered("llama-tied")), NoProgress()), Span(0, NUM_LAYERS)), "other")
    models = load_stages(source, num_stages)
    texts = {}
    for drafter in (NgramDrafter(), itself, CombinedDrafter(other)):
        async with model_swarm(models, drafter) as swarm:
            # Drafts that do not know of the constraint change no token either.
            for guides in (grammars, None) if isinstance(drafter, NgramDrafter) else (grammars,):
                swarm.engine.own_drafter.grammars = guides
                for constraint, sampling, shaping in CASES:
                    for decision in DECISIONS.values():
                        tokens, _ = await write(
                            swarm.engine, decision, constraint=constraint, sampling=sampling, shaping=shaping
                        )
                        texts.setdefault((sampling, constraint), set()).add(tuple(tokens))
            await swarm.all_closed()
    assert len(texts) == len(CASES)
    for (_, constraint), written in texts.items():
        (tokens,) = written
        assert is_within(grammars, constraint, tokens)
        if constraint is JSON and tokens[-1] == EOS:
            assert set(json.loads(read(tokens))) == {"name", "size", "legs"}


async def test_guided_drafts_hit_where_unguided_ones_miss(lettered):
    source = find_model(str(lettered("llama")), NoProgress())
    windows = {}
    async with model_swarm(load_stages(source, 2), NgramDrafter()) as swarm:
        for guides in (None, ModelGrammars(source.folder, VOCAB)):
            swarm.engine.own_drafter.grammars = guides
            _, generation = await write(swarm.engine, DECISIONS["sync"])
            windows[guides is not None] = generation.stats.num_epochs
    # `{"name": "`, `", "size": "` and `", "legs": ` are forced, but for the space between.
    assert windows[True] < 0.7 * windows[False]


class Turning:
    """A toy grammar whose allowed tokens change from position to position: a tail that lost its place would be seen."""

    def grammar(self, constraint, stop_tokens):
        return self

    def start(self):
        return TurningMatcher()


class TurningMatcher:
    is_over = False

    def __init__(self, position=0):
        self.position = position

    def allows(self, token):
        return (token + self.position) % 3 == 0

    def allowed(self):
        return np.arange(VOCAB) % 3 == (-self.position) % 3

    def forced(self):
        return []

    def advance(self, token):
        assert self.allows(token), "a token that the constraint does not allow was committed"
        self.position += 1

    def rewind(self, num_tokens):
        self.position -= num_tokens

    def copy(self):
        return TurningMatcher(self.position)


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_lost_stage_costs_no_place_in_the_constraint(position, monkeypatch):
    made = ToyNode.__init__

    def with_grammar(self, *args, **options):
        made(self, *args, **options)
        if self.model is not None:
            self.model.grammars = Turning()

    monkeypatch.setattr(ToyNode, "__init__", with_grammar)
    monkeypatch.setattr("toy_model.ToySpanModel.narrow", _narrow_with_grammar())
    texts = []
    for kills in (False, True):
        async with toy_swarm(*SPANS) as (_, _, nodes, client):
            victim = {node.peer: node for node in nodes}[(await used(client))[position]]
            text = TextRequest(max_tokens=60, constraint=WORDS)
            tokens = []
            with trio.fail_after(60):
                options = GenerateOptions(text=text, stall_timeout_s=5)
                async with client.engine.generate([1, 2, 3], options, StaticPolicy(TREE)) as generation:
                    async for token in generation:
                        tokens.append(token)
                        if kills and len(tokens) == 20:
                            victim.scope.cancel()
            texts.append(tokens)
            assert generation.stats.num_replays == kills
            await all_free([node for node in nodes if not (kills and node is victim)])
    assert texts[0] == texts[1]
    assert [(token + index) % 3 for index, token in enumerate(texts[0])] == [0] * 60


def _narrow_with_grammar():
    from toy_model import ToySpanModel

    narrow = ToySpanModel.narrow

    def narrowed(self, span):
        part = narrow(self, span)
        part.grammars = self.grammars
        return part

    return narrowed


async def test_a_later_turn_starts_its_constraint_anew(lettered):
    source = find_model(str(lettered("llama")), NoProgress())
    async with model_swarm(load_stages(source, 2), NgramDrafter()) as swarm:
        swarm.engine.own_drafter.grammars = ModelGrammars(source.folder, VOCAB)
        first, _ = await write(swarm.engine, TREE, owner="alice")
        await swarm.all_closed()
        turn = [*PROMPT, *first, *spelled(" And a dog:")]
        kept, generation = await write(swarm.engine, TREE, prompt=turn, owner="alice")
        assert generation.stats.num_prefix_tokens > len(PROMPT)
        fresh, generation = await write(swarm.engine, PLAIN, prompt=turn)
        assert generation.stats.num_prefix_tokens == 0
    assert kept == fresh
    assert is_within(swarm.engine.own_drafter.grammars, JSON, kept)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=1)], ids=["greedy", "sampled"])
async def test_honest_stages_are_not_accused_for_a_constraint(lettered, sampling):
    async with swarm_of(lettered) as swarm:
        engine = swarm.engine
        engine.own_drafter.grammars = ModelGrammars(lettered("llama"), VOCAB)
        _, generation = await write(engine, DECISIONS["chain"], sampling=sampling, audit=True)
        assert generation.driver.checks.num_checks > 0
        assert engine.trust.distrusted == {}


@pytest.mark.parametrize("has_tokenizer", [True, False])
async def test_what_cannot_be_constrained_is_the_requests_error(lettered, tiny, has_tokenizer):
    folder = lettered("llama") if has_tokenizer else tiny("llama")
    source = find_model(str(folder), NoProgress())
    wrong = Constraint(ConstraintKind.REGEX, "(" if has_tokenizer else "a")
    async with model_swarm(load_stages(source, 2), NgramDrafter()) as swarm:
        with pytest.raises(DsdError, match="cannot be"):
            await write(swarm.engine, TREE, constraint=wrong)
        await swarm.all_closed()
        tokens, _ = await write(swarm.engine, TREE, constraint=None)
        assert len(tokens) > 0
    with pytest.raises(ConfigError):
        ModelGrammars(folder, VOCAB).grammar(wrong, (EOS,)).start()

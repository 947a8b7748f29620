"""One conformance suite over every drafter; what each is good for."""

import math
import random

import pytest
import reference
import torch
from families import NUM_LAYERS, VOCAB
from prompting import prompt_of

from dsd_p2p.drafting.combined import CombinedDrafter
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.drafting.shadow import make_shadow
from dsd_p2p.errors import CapacityError
from dsd_p2p.models.int8 import Int8Linear
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.rows import LogitsRow
from dsd_p2p.models.source import find_model
from dsd_p2p.session.effects import Candidate, Draft, Stem
from dsd_p2p.types import Sampling, Span
from dsd_p2p.verification.exact import ExactVerifier


@pytest.fixture(params=["ngram", "model", "combined", "shadow"])
def drafter(request, tiny):
    source = find_model(str(tiny("llama")), NoProgress())
    match request.param:
        case "ngram":
            return NgramDrafter()
        case "model":
            return ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "model")
        case "combined":
            return CombinedDrafter(ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "model"))
        case _:
            return make_shadow(source, NUM_LAYERS)


def draft_of(tokens, *paths, width=3):
    stems = tuple(Stem(key=path[-1][0] if path else len(tokens) - 1, path=tuple(path)) for path in paths)
    return Draft(tokens=tuple(tokens), keys=tuple(range(len(tokens))), stems=stems, width=width)


def test_candidates_are_distinct_ranked_and_within_the_width(drafter):
    text = prompt_of(20) * 3
    session = drafter.open(100)
    for width in (1, 2, 4):
        answers = session.expand(draft_of(text, [], [(100, text[0])], [(100, text[0]), (101, text[1])], width=width))
        assert len(answers) == 3
        for candidates in answers:
            assert len(candidates) <= width
            assert len({c.token for c in candidates}) == len(candidates)
            assert all(0 <= c.token < VOCAB and c.logprob <= 1e-6 for c in candidates)
            assert [c.logprob for c in candidates] == sorted((c.logprob for c in candidates), reverse=True)
            assert sum(math.exp(c.logprob) for c in candidates) <= 1 + 1e-5
    session.close()


def test_a_session_that_lived_through_a_tree_answers_like_a_fresh_one(drafter):
    """Commits on and off the drafted path, stems of any depth: what is cached never changes an answer."""
    rng = random.Random(5)
    text, next_key = prompt_of(6), 1000
    keys = list(range(6))
    session = drafter.open(200)
    paths = [[]]
    for _ in range(25):
        for path in rng.sample(paths, k=min(len(paths), 2)):
            paths.append([*path, (next_key, rng.randrange(VOCAB))])
            next_key += 1
        stems = tuple(
            Stem(key=path[-1][0] if path else keys[-1], path=tuple(path))
            for path in rng.sample(paths, k=min(3, len(paths)))
        )
        draft = Draft(tokens=tuple(text), keys=tuple(keys), stems=stems, width=4)
        lived = session.expand(draft)
        fresh_session = drafter.open(200)
        fresh = fresh_session.expand(draft)
        fresh_session.close()
        for old, new in zip(lived, fresh, strict=True):
            if drafter.name == "shadow":
                # One activation scale a call: what else is in it moves the answer a little.
                assert old[0].logprob == pytest.approx(new[0].logprob, abs=0.5)
                continue
            assert [c.token for c in old] == [c.token for c in new]
            assert [c.logprob for c in old] == pytest.approx([c.logprob for c in new], abs=1e-3)
        if rng.random() < 0.6:
            deep = rng.choice(paths)
            if deep and rng.random() < 0.7:
                (key, token), *_ = deep
            else:
                key, token = next_key, rng.randrange(VOCAB)
                next_key += 1
            text.append(token)
            keys.append(key)
            paths = [[], *(path[1:] for path in paths if len(path) > 1 and path[0][0] == key)]
    session.close()


def test_the_model_drafts_what_it_would_say_itself(tiny):
    folder = tiny("llama")
    drafter = ModelDrafter(open_span(find_model(str(folder), NoProgress()), Span(0, NUM_LAYERS)), "model")
    session = drafter.open(100)
    text = prompt_of(12)
    (candidates,) = session.expand(draft_of(text, []))
    expected = torch.log_softmax(reference.logits(folder, text)[-1], -1).topk(3)
    assert [c.token for c in candidates] == expected.indices.tolist()
    assert [c.logprob for c in candidates] == pytest.approx(expected.values.tolist(), abs=1e-4)


def test_a_level_is_one_forward_and_nothing_is_computed_twice(tiny, monkeypatch):
    model = open_span(find_model(str(tiny("llama")), NoProgress()), Span(0, NUM_LAYERS))
    sizes = []
    views = model.views
    monkeypatch.setattr(model, "views", lambda c, f, i, r: sizes.append(len(i)) or views(c, f, i, r))
    session = ModelDrafter(model, "model").open(100)
    text = prompt_of(10)
    session.expand(draft_of(text, []))
    session.expand(draft_of(text, [(100, 5)], [(101, 6)], [(102, 7)]))
    session.expand(draft_of(text, [(100, 5), (103, 8)], [(101, 6), (104, 9)]))
    committed = Draft(
        tokens=(*text, 5), keys=(*range(10), 100), stems=(Stem(key=105, path=((103, 8), (105, 2))),), width=2
    )
    session.expand(committed)
    assert sizes == [10, 3, 2, 1]


def test_the_shadow_is_a_quarter_of_the_bytes_and_mostly_of_one_mind_with_the_target(smollm):
    shadow = make_shadow(smollm, 30)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm.folder)
    prompt = tokenizer("Once upon a time, in a small village by the sea, there lived").input_ids
    truth = reference.greedy(smollm.path, prompt, 60)
    session = shadow.open(200)
    hits = 0
    for length in range(len(truth)):
        text = [*prompt, *truth[:length]]
        ((candidate,),) = session.expand(draft_of(text, [], width=1))
        hits += candidate.token == truth[length]
    session.close()
    assert hits >= 45, f"{hits} of {len(truth)}"


@pytest.mark.parametrize("num_rows", [1, 16, 17, 200])
def test_a_rounded_layer_adds_its_bias_once(num_rows):
    torch.manual_seed(3)
    layer = torch.nn.Linear(64, 48)
    layer.bias.data.mul_(10)
    # Rows of very different size, as a prompt's first tokens are.
    inputs = torch.randn(1, num_rows, 64) * torch.logspace(0, 1, num_rows)[:, None]
    rounded = Int8Linear(layer.weight.detach(), layer.bias)
    with torch.inference_mode():
        torch.testing.assert_close(rounded(inputs), layer(inputs), rtol=0, atol=0.03 * float(inputs.abs().max()))


def test_the_ngram_drafter_continues_what_it_has_seen():
    text = [7, 8, 9, 10, 11, 12, 50, 51, 7, 8, 9]
    session = NgramDrafter().open(100)
    path = []
    for expected in (10, 11, 12, 50):
        ((first, *_),) = session.expand(draft_of(text, list(path)))
        assert first.token == expected
        path.append((100 + len(path), first.token))
    assert session.expand(draft_of([*text, 99], [])) == [[]], "what was never seen is not guessed"


def test_the_ngram_drafter_learns_how_far_to_trust_itself():
    repeating, random_text = [1, 2, 3, 4, 5] * 20, random.Random(1).choices(range(30), k=400)
    sure = NgramDrafter().open(500).expand(draft_of(repeating, []))[0][0]
    unsure = NgramDrafter().open(500).expand(draft_of(random_text, []))[0][0]
    assert sure.logprob > math.log(0.9)
    assert unsure.logprob < math.log(0.4)


def test_a_drafter_without_memory_says_so(tiny):
    model = open_span(find_model(str(tiny("llama")), NoProgress()), Span(0, NUM_LAYERS), cache_bytes=1000)
    with pytest.raises(CapacityError, match="raise --cache-memory"):
        ModelDrafter(model, "model").open(100)


def test_with_the_targets_noise_a_drafter_guesses_its_samples(tiny):
    """The drafter is the target: with the same seed its first candidate is the very token, with another it rarely is."""
    source = find_model(str(tiny("llama")), NoProgress())
    model = open_span(source, Span(0, NUM_LAYERS))
    text = prompt_of(8)
    hits = {}
    for seed in (7, 8):
        session = ModelDrafter(model, "itself").open(200, Sampling(temperature=1.0, seed=seed))
        target = ExactVerifier(Sampling(temperature=1.0, seed=7))
        hits[seed] = 0
        for length in range(len(text), len(text) + 30):
            row = LogitsRow(reference.logits(tiny("llama"), [*text])[-1], 0)
            token = target.pick(row, length)
            ((first, *_),) = session.expand(draft_of(text, []))
            hits[seed] += first.token == token
            text = [*text, token]
        text = prompt_of(8)
        session.close()
    assert hits[7] >= 28
    assert hits[8] < 20


def test_lookup_looks_several_tokens_ahead_where_text_repeats_itself():
    phrase = [5, 9, 3, 8, 7, 2, 6, 4, 1]
    session = NgramDrafter().open(200)
    (chain,) = session.chains(draft_of([*phrase * 4, *phrase[:3]], []), max_tokens=5, min_prob=0.2)
    found = []
    while chain is not None:
        found.append(chain.token)
        chain = chain.children[0] if chain.children else None
    assert found == [8, 7, 2, 6, 4]
    assert session.chains(draft_of([11, 12, 13], []), max_tokens=5, min_prob=0.2) == [None]


class Stubborn:
    """Always sure of token 1."""

    name, is_instant = "stubborn", True

    def open(self, max_length, sampling=None):
        return self

    def expand(self, draft):
        return [[Candidate(token=1, logprob=math.log(0.9), source="stubborn")] for _ in draft.stems]

    def close(self):
        pass


def test_merged_candidates_are_one_node_and_trust_goes_to_who_is_right():
    phrase = [5, 9, 3, 8, 7, 2, 6, 4]
    session = CombinedDrafter(Stubborn()).open(200)
    text = phrase * 3
    ranks = []
    for token in phrase * 2:
        (candidates,) = session.expand(draft_of(text, []))
        assert len({candidate.token for candidate in candidates}) == len(candidates)
        ranks.append([candidate.token for candidate in candidates].index(token))
        text = [*text, token]
    assert ranks[0] == 1, "at first the model is believed"
    assert ranks[-1] == 0, "lookup was right every time"
    (candidates,) = session.expand(draft_of(text, []))
    assert candidates[0].source == "ngram"
    assert candidates[0].children[0].token == phrase[1]

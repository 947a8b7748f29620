"""Drafts within a constraint: forbidden guesses go, forced tokens come, and errors cost only guesses."""

import math
import random

import pytest
from families import VOCAB
from letters import EOS, read, save_letters, spelled

from dsd_p2p.drafting.guided import Guide
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.session.effects import Candidate, Draft, Stem
from dsd_p2p.types import Constraint, ConstraintKind

PROMPT = spelled("ask:")


@pytest.fixture(scope="module")
def grammars(tmp_path_factory):
    from families import save_tiny_model

    return ModelGrammars(save_letters(save_tiny_model("llama", tmp_path_factory.mktemp("g") / "llama")), VOCAB)


def guide(grammars, regex):
    return Guide(grammars.grammar(Constraint(ConstraintKind.REGEX, regex), (EOS,)), len(PROMPT))


def draft(answer="", paths=("",), width=4):
    tokens = [*PROMPT, *spelled(answer)]
    stems = tuple(
        Stem(key=100 + index, path=tuple(enumerate(spelled(path), 1000 * (index + 1))))
        for index, path in enumerate(paths)
    )
    return Draft(tokens=tokens, keys=range(len(tokens)), stems=stems, width=width)


def guess(text, prob, children=()):
    return Candidate(token=spelled(text)[0], logprob=math.log(prob), source="x", children=tuple(children))


def shown(found):
    return [[(read([each.token]), round(math.exp(each.logprob), 2)) for each in candidates] for candidates in found]


def test_guesses_that_the_constraint_forbids_go_and_their_share_goes_to_the_others(grammars):
    found = guide(grammars, "(yes|no).*").guided(draft(), [[guess("x", 0.5), guess("y", 0.3), guess("n", 0.1)]])
    assert shown(found) == [[("y", 0.6), ("n", 0.2)]]


def test_forced_text_is_a_chain_that_needs_no_drafter(grammars):
    our = guide(grammars, "(yes|no), of course")
    (chain,) = our.guided(draft("yes"), [[]])[0]
    text = []
    while True:
        text.append(chain.token)
        if not chain.children:
            break
        (chain,) = chain.children
    assert read(text) == ", of course"[: len(text)]
    assert len(text) > 8


def test_stems_are_followed_and_those_outside_get_nothing(grammars):
    found = guide(grammars, "ab|cd").guided(
        draft(paths=("a", "c", "b")), [[guess("b", 0.5), guess("d", 0.5)], [guess("d", 0.9)], [guess("a", 1.0)]]
    )
    assert [[letter for letter, _ in each] for each in shown(found)] == [["b"], ["d"], []]


def test_what_hangs_below_a_guess_is_kept_to_the_constraint_too(grammars):
    found = guide(grammars, "a(b|c)+").guided(
        draft(), [[guess("a", 0.9, [guess("b", 0.5, [guess("x", 1.0)]), guess("y", 0.5)])]]
    )
    ((first,),) = found
    assert [read([each.token]) for each in first.children] == ["b"]
    assert first.children[0].children == ()


def test_after_the_end_nothing_is_changed(grammars):
    tokens = [*PROMPT, *spelled("a"), EOS]
    asked = Draft(tokens=tokens, keys=range(len(tokens)), stems=(Stem(key=1, path=()),), width=2)
    guesses = [[guess("z", 1.0)]]
    assert guide(grammars, "a").guided(asked, guesses) == guesses


def test_a_text_outside_the_constraint_or_a_wrong_one_costs_only_the_guidance(grammars):
    guesses = [[guess("z", 1.0)]]
    assert guide(grammars, "a+").guided(draft("bbb"), guesses) == guesses
    assert guide(grammars, "(").guided(draft(), guesses) == guesses


@pytest.mark.parametrize("seed", range(6))
def test_it_follows_a_text_that_grows_by_any_steps(grammars, seed):
    rng, text = random.Random(seed), "a, b, c, d, e"
    our, at = guide(grammars, "[a-z](, [a-z])*"), 0
    while at < len(text) - 1:
        at = min(len(text) - 1, at + rng.randrange(0, 4))
        found = our.guided(draft(text[:at]), [[guess(text[at], 0.5), guess("!", 0.5)]])
        assert read([found[0][0].token]) == text[at]

"""Shaped logits are those of transformers' own processors; constrained picks stay within; both can be taken back."""

import numpy as np
import pytest
import torch
from rows import Row
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.types import (
    Constraint,
    ConstraintKind,
    Relaxation,
    Sampling,
    Shaping,
    TextRequest,
    check_text_request,
)
from dsd_p2p.verification.choice import choose_verifier

VOCAB = 12
PROMPT = [3, 5, 5]
CRITICAL = {2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88, 8: 31.83, 9: 33.72, 10: 35.56, 11: 37.37}
"""Chi-square values that a true sampler exceeds once in ten thousand draws, by degrees of freedom."""


def logits_of(seed):
    return np.random.default_rng(seed).normal(scale=2.0, size=VOCAB).astype(np.float32)


def session(grammars=None, **fields):
    return choose_verifier(TextRequest(max_tokens=64, **fields), grammars).open(len(PROMPT))


def theirs(shaping, answer, logits):
    """The logits after transformers' processors; presence and frequency are OpenAI's formula."""
    ids = torch.tensor([PROMPT + answer])
    scores = torch.tensor(logits)[None]
    if shaping.repetition != 1:
        scores = RepetitionPenaltyLogitsProcessor(shaping.repetition)(ids, scores)
    for token in set(answer):
        scores[0, token] -= shaping.presence + shaping.frequency * answer.count(token)
    if shaping.bias:
        scores = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in shaping.bias])(ids, scores)
    if shaping.min_tokens:
        scores = MinNewTokensLengthLogitsProcessor(len(PROMPT), shaping.min_tokens, [7], device="cpu")(ids, scores)
    if shaping.min_p:
        scores = MinPLogitsWarper(shaping.min_p)(ids, scores)
    return scores[0].double().numpy()


SHAPINGS = [
    Shaping(repetition=1.7, seen=(3, 5)),
    Shaping(presence=0.9),
    Shaping(frequency=0.7),
    Shaping(bias=((4, 2.5), (8, -100.0))),
    Shaping(min_tokens=3),
    Shaping(min_p=0.2),
    Shaping(repetition=1.3, seen=(3, 5), presence=-0.5, frequency=0.4, bias=((1, 1.0),), min_tokens=9, min_p=0.05),
]


@pytest.mark.parametrize("shaping", SHAPINGS, ids=lambda each: str(each)[:40])
def test_greedy_picks_are_those_of_transformers_processors(shaping):
    for seed in range(60):
        ours = session(shaping=shaping, stop_tokens=(7,))
        answer = []
        for step in range(6):
            logits = logits_of(1000 * seed + step)
            expected = int(theirs(shaping, answer, logits).argmax())
            assert ours.judge(Row(logits), None).token == expected
            ours.accept(expected)
            answer.append(expected)


@pytest.mark.parametrize("shaping", SHAPINGS, ids=lambda each: str(each)[:40])
def test_samples_are_distributed_as_after_transformers_processors(shaping):
    answer, logits, draws = [6, 6, 9], logits_of(1), 6000
    scores = theirs(shaping, answer, logits)
    weights = np.exp(scores - scores.max())
    expected = draws * weights / weights.sum()
    counts = np.zeros(VOCAB)
    for seed in range(draws):
        ours = session(shaping=shaping, stop_tokens=(7,), sampling=Sampling(temperature=1.0, seed=seed))
        for token in answer:
            ours.accept(token)
        counts[ours.judge(Row(logits), None).token] += 1
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # Rare tokens share a cell, or the statistic would not be chi-square.
    rare = kept & (expected < 8)
    cells = [
        *((counts[i], expected[i]) for i in np.flatnonzero(kept & ~rare)),
        (counts[rare].sum(), expected[rare].sum()),
    ]
    cells = [cell for cell in cells if cell[1] > 0]
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    assert statistic < CRITICAL[max(2, len(cells) - 1)]


class Digits:
    """A toy grammar: an answer of the digits 0 to `last`, in order; token 7 stops."""

    def __init__(self, last=4, fails=False):
        self.last, self.fails, self.num_started = last, fails, 0

    def grammar(self, constraint, stop_tokens):
        return self

    def start(self):
        if self.fails:
            raise ConfigError("the grammar cannot be used: no")
        self.num_started += 1
        return DigitsMatcher(self.last)


class DigitsMatcher:
    def __init__(self, last, written=()):
        self.last, self.written = last, list(written)

    @property
    def is_over(self):
        return 7 in self.written

    def allows(self, token):
        if self.is_over:
            return True
        return token == (len(self.written) if len(self.written) <= self.last else 7)

    def allowed(self):
        return np.array([self.allows(token) for token in range(VOCAB)])

    def forced(self):
        return [] if self.is_over else [token for token in range(VOCAB) if self.allows(token)]

    def advance(self, token):
        if not self.allows(token):
            raise RemoteProtocolError("token", token, "one that the constraint allows")
        self.written.append(token)

    def rewind(self, num_tokens):
        del self.written[len(self.written) - num_tokens :]

    def copy(self):
        return DigitsMatcher(self.last, self.written)


ANY = Constraint(ConstraintKind.REGEX, "01234")


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=2, seed=3)])
@pytest.mark.parametrize("shaping", [None, Shaping(presence=1.0)])
def test_a_constrained_answer_stays_within_and_nothing_binds_after_its_stop(sampling, shaping):
    ours = session(Digits(), sampling=sampling, shaping=shaping, constraint=ANY, stop_tokens=(7,))
    written = []
    for step in range(6):
        token = ours.judge(Row(logits_of(step)), None).token
        ours.accept(token)
        written.append(token)
    assert written == [0, 1, 2, 3, 4, 7]
    free = session(sampling=sampling, shaping=shaping, stop_tokens=(7,))
    for token in written:
        free.accept(token)
    assert ours.judge(Row(logits_of(9)), None) == free.judge(Row(logits_of(9)), None)


def test_a_text_is_rewound_with_its_place_in_the_constraint():
    ours = session(Digits(), constraint=ANY, stop_tokens=(7,), shaping=Shaping(frequency=2.0))
    for token in (0, 1, 2):
        ours.accept(token)
    ours.rewind(len(PROMPT) + 1)
    assert ours.length == len(PROMPT) + 1
    assert ours.judge(Row(logits_of(0)), None).token == 1


def test_what_the_constraint_does_not_allow_is_not_accepted():
    ours = session(Digits(), constraint=ANY, stop_tokens=(7,))
    with pytest.raises(RemoteProtocolError, match="one that the constraint allows"):
        ours.accept(3)


def test_a_constraint_is_compiled_once_and_its_errors_are_the_requests():
    grammars = Digits()
    ours = session(grammars, constraint=ANY, stop_tokens=(7,))
    for _ in range(2):
        ours.judge(Row(logits_of(0)), None)
    assert grammars.num_started == 1
    with pytest.raises(ConfigError, match="cannot be used"):
        session(Digits(fails=True), constraint=ANY).judge(Row(logits_of(0)), None)
    with pytest.raises(ConfigError, match="cannot constrain answers"):
        session(None, constraint=ANY)


def test_a_constraint_that_no_token_of_the_model_meets_is_an_error():
    ours = session(Digits(), constraint=ANY, stop_tokens=(7,))
    row = logits_of(0)
    row[0] = -np.inf
    with pytest.raises(ConfigError, match="allows no token"):
        ours.judge(Row(row), None)


def test_relaxed_mode_does_not_apply_to_shaped_or_constrained_text():
    for fields in ({"shaping": Shaping(min_p=0.1)}, {"constraint": ANY}):
        ours = session(Digits(), relaxation=Relaxation(), stop_tokens=(7,), **fields)
        assert type(ours).__name__ == "ShapedSession"


@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(presence=3.0),
        Shaping(repetition=0.0),
        Shaping(min_p=1.5),
        Shaping(bias=((1, 101.0),)),
        Shaping(bias=((-1, 0.0),)),
    ],
)
def test_values_out_of_range_are_refused(shaping):
    with pytest.raises(ConfigError, match="shaping"):
        check_text_request(TextRequest(max_tokens=1, shaping=shaping))


def test_an_audit_compares_what_the_target_picks_from():
    """With the bias, 1 is the pick by a hair; in the raw logits 2 would be two ahead."""
    row = Row([0.0, 1.0, 3.0, *[-9.0] * (VOCAB - 3)])
    ours = session(shaping=Shaping(bias=((1, 2.0001),)))
    assert ours.judge(row, None).token == 1
    assert ours.gap(row, 1, 2) == pytest.approx(0.0001, abs=1e-5)
    bound = session(Digits(), constraint=ANY, stop_tokens=(7,))
    assert bound.judge(row, None).token == 0
    assert bound.gap(row, 0, 2) == np.inf
    assert session().gap(row, 2, 1) == 2.0
    assert session().gap(row, 2, VOCAB) == np.inf

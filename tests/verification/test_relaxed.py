"""Relaxed verification: what it may let stand, that exact mode never does, and that everything relaxed is counted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rows import Row
from swarms import memory_swarm
from toy import VOCAB, next_token, plain_text
from toy_model import ToyDrafter, ToySpanModel

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.session.effects import Candidate
from dsd_p2p.types import GREEDY, Relaxation, RelaxationRule, Sampling, Span, TextRequest
from dsd_p2p.verification.adaptive import STRICT_START, AdaptiveVerifier
from dsd_p2p.verification.exact import ExactVerifier
from dsd_p2p.verification.importance import DraftOpinion, Signals, is_decisive, signals_of
from dsd_p2p.window.static import StaticPolicy, continuous_tree, sync_chain
from node.config.relaxation import Thresholds, bundled_thresholds, read_thresholds, write_thresholds
from node.lab.benches.relaxed_chat import REFUSAL, accepted_length
from node.lab.quality.pair_writer import Disagreement
from node.lab.quality.thresholds import outcome, position_of

LOOSE = Relaxation(tau=0.5, max_ce_ratio=1e9, max_prob_gap=1.0, min_norm_match=0.0, max_overshoot=1e9, budget=10.0)


def opinion(probs):
    order = np.argsort(-np.asarray(probs), kind="stable")
    return DraftOpinion(tokens=order.astype(np.int64), logprobs=np.log(np.asarray(probs))[order])


LOGITS = st.lists(st.floats(-5, 5), min_size=6, max_size=6)
PROBS = st.lists(st.floats(0.01, 1), min_size=6, max_size=6).map(lambda values: np.array(values) / sum(values))


@given(logits=LOGITS, probs=PROBS, temperature=st.sampled_from([0.0, 0.7]), position=st.integers(0, 99))
def test_without_weight_of_the_drafter_nothing_is_relaxed(logits, probs, temperature, position):
    sampling = Sampling(temperature=temperature, seed=3)
    pick = AdaptiveVerifier(sampling, Relaxation(tau=0.0)).pick(Row(logits), position, opinion(probs))
    assert pick == (ExactVerifier(sampling).pick(Row(logits), position), False, 0.0)


@given(logits=LOGITS, probs=PROBS, tau=st.floats(0, 1))
def test_the_blend_is_the_softmax_of_blended_logits(logits, probs, tau):
    relaxation = Relaxation(tau=tau, max_ce_ratio=1e9, max_prob_gap=1.0, min_norm_match=0.0, max_overshoot=1e9)
    token, is_relaxed, _ = AdaptiveVerifier(GREEDY, relaxation).pick(Row(logits), 5, opinion(probs))
    blended = (1 - tau) * np.float32(logits).astype(np.float64) + tau * np.log(probs)
    assert blended[token] == pytest.approx(blended.max(), abs=1e-9) or token == np.argmax(probs)
    assert is_relaxed == (token != Row(logits).argmax())


@given(logits=LOGITS, probs=PROBS, ceiling=st.floats(1, 4))
def test_nothing_the_drafter_overrates_is_let_stand(logits, probs, ceiling):
    relaxation = Relaxation(tau=0.9, max_ce_ratio=1e9, max_prob_gap=1.0, min_norm_match=0.0, max_overshoot=ceiling)
    token, is_relaxed, _ = AdaptiveVerifier(GREEDY, relaxation).pick(Row(logits), 5, opinion(probs))
    target = np.exp(np.float32(logits).astype(np.float64))
    if is_relaxed:
        assert probs[token] <= ceiling * target[token] / target.sum() * (1 + 1e-6)


def test_signals_are_those_of_the_docstring():
    target, draft = np.array([0.5, 0.3, 0.1, 0.1]), np.array([0.2, 0.6, 0.15, 0.05])
    signals = signals_of(np.log(target), DraftOpinion(tokens=np.array([1, 0]), logprobs=np.log([0.6, 0.2])), 1)
    assert signals.ce_ratio == pytest.approx(math.log(0.3) / math.log(0.6))
    assert signals.prob_gap == pytest.approx(0.3)
    assert signals.norm_match == pytest.approx((0.2 + 0.3) / 0.8)
    assert draft.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "signals",
    [
        Signals(ce_ratio=9, prob_gap=0.1, norm_match=0.9),
        Signals(ce_ratio=1, prob_gap=0.5, norm_match=0.9),
        Signals(ce_ratio=1, prob_gap=0.1, norm_match=0.5),
    ],
)
def test_any_signal_alone_makes_a_token_key(signals):
    relaxation = Relaxation(max_ce_ratio=8, max_prob_gap=0.4, min_norm_match=0.6)
    assert is_decisive(signals, relaxation)
    assert not is_decisive(Signals(ce_ratio=1, prob_gap=0.1, norm_match=0.9), relaxation)


@pytest.mark.parametrize(("runner_up", "is_relaxed"), [(2.8, True), (2.6, False)])
def test_the_margin_rule_takes_a_close_runner_up_only(runner_up, is_relaxed):
    relaxation = Relaxation(rule=RelaxationRule.MARGIN, max_margin=0.3, max_overshoot=10)
    view = Row([3.0, runner_up, 1.0])
    draft = opinion(np.array([0.2, 0.7, 0.1]))
    assert AdaptiveVerifier(GREEDY, relaxation).pick(view, 1, draft)[:2] == (int(is_relaxed), is_relaxed)
    third = opinion(np.array([0.2, 0.1, 0.7]))
    assert AdaptiveVerifier(GREEDY, relaxation).pick(view, 1, third)[:2] == (0, False)


@pytest.mark.parametrize("tokens", [[1, 99], [1, 1]])
def test_a_drafters_tokens_must_be_the_vocabularys(tokens):
    draft = DraftOpinion(tokens=np.array(tokens), logprobs=np.log([0.6, 0.2]))
    with pytest.raises(RemoteProtocolError, match="draft tokens"):
        AdaptiveVerifier(GREEDY, LOOSE).pick(Row([3.0, 1.0, 0.0]), 1, draft)


def stubborn(text, width):
    """Expects the truth in one place of three, and something else, very surely, in the others."""
    token = next_token(text)
    if len(text) % 3:
        token = (token + 1) % VOCAB
    others = [other for other in range(VOCAB) if other != token]
    probs = [0.94] + [0.01] * len(others)
    return [Candidate(token=t, logprob=math.log(p)) for t, p in zip([token, *others], probs, strict=True)][:width]


@pytest.mark.parametrize(
    "decision",
    [sync_chain(6), continuous_tree(depth=12, width=2, window_nodes=4, max_in_flight=8, min_path_prob=0.0)],
)
async def test_everything_relaxed_is_counted_and_the_rest_is_the_targets(decision):
    prompt, num_tokens = [1, 2, 3], 40
    spans = [Span(0, 1), Span(1, 2)]
    stages = [ToySpanModel(span, 2) for span in spans]
    drafter = ToyDrafter(stubborn, is_instant=False)
    async with memory_swarm(stages, drafter, vocab_size=VOCAB, num_layers=2, spans=spans) as swarm:
        for relaxation in (None, LOOSE):
            options = GenerateOptions(text=TextRequest(max_tokens=num_tokens, relaxation=relaxation))
            async with swarm.engine.generate(prompt, options, StaticPolicy(decision)) as generation:
                tokens = [token async for token in generation]
            text = [*prompt, *tokens]
            strays = [end for end in range(len(prompt), len(text)) if text[end] != next_token(text[:end])]
            assert len(strays) == generation.stats.num_relaxed_tokens
            if relaxation is None:
                assert tokens == plain_text(prompt, num_tokens)
            else:
                assert len(strays) > 5


def test_a_calibration_survives_its_file(tmp_path):
    bundled = read_thresholds(bundled_thresholds())
    write_thresholds(bundled, tmp_path / "copy.json")
    assert read_thresholds(tmp_path / "copy.json") == bundled
    assert isinstance(bundled, Thresholds)
    assert 0 < bundled.relaxed_share < 1


@pytest.mark.parametrize("text", ["", "{}", '{"relaxation": {"tau": 2}, "provenance": {}}'])
def test_a_broken_calibration_says_so(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ConfigError, match="dsd calibrate"):
        read_thresholds(tmp_path / "broken.json")


@given(logits=LOGITS, probs=PROBS, tau=st.floats(0, 1), keep=st.integers(1, 6), overshoot=st.floats(1, 5))
def test_the_search_for_thresholds_judges_as_the_verifier_does(logits, probs, tau, keep, overshoot):
    relaxation = Relaxation(tau=tau, max_ce_ratio=3, max_prob_gap=0.4, min_norm_match=0.3, max_overshoot=overshoot)
    full = opinion(probs)
    draft = DraftOpinion(tokens=full.tokens[:keep], logprobs=full.logprobs[:keep])
    strict = Row(logits).argmax()
    if draft.tokens[0] == strict:
        return
    position = position_of(Disagreement(strict=strict, target_row=torch.tensor(logits), opinion=draft))
    share, loss = outcome([position], 1, relaxation)
    assert share == AdaptiveVerifier(GREEDY, relaxation).pick(Row(logits), 1, draft).is_relaxed
    assert loss >= 0


@given(seed=st.integers(0, 999), stop=st.integers(0, 5))
def test_the_beginning_and_the_end_of_an_answer_are_the_targets_own(seed, stop):
    """However loose the thresholds: a first token decides the answer, and an end cannot be taken back."""
    rng = np.random.default_rng(seed)
    verifier = AdaptiveVerifier(GREEDY, LOOSE, (stop,))
    session, exact = verifier.open(3), ExactVerifier(GREEDY)
    num_relaxed = 0
    for index in range(STRICT_START + 40):
        view, draft = Row(rng.normal(size=6)), opinion(rng.dirichlet(np.ones(6)))
        token, is_relaxed, _ = session.judge(view, draft)
        strict = exact.pick(view, session.length)
        if index < STRICT_START or strict == stop:
            assert (token, is_relaxed) == (strict, False)
        assert not (is_relaxed and token == stop)
        num_relaxed += is_relaxed
        session.accept(token)
    assert num_relaxed > 0
    session.rewind(4)
    assert session.judge(Row([0, 1, 0, 0, 0, 0]), opinion([0.9, 0.02, 0.02, 0.02, 0.02, 0.02])).token == 1


@given(seed=st.integers(0, 999), budget=st.sampled_from([0.0, 0.02, 0.3]), temperature=st.sampled_from([0.0, 0.8]))
def test_no_beginning_of_a_text_costs_more_than_its_budget(seed, budget, temperature):
    """Whatever is taken back on the way, and whatever was written before this tail took over."""
    rng = np.random.default_rng(seed)
    sampling = Sampling(temperature=temperature, seed=seed)
    session = AdaptiveVerifier(sampling, replace(LOOSE, budget=budget)).open(3)
    for _ in range(rng.integers(0, 20)):
        session.accept(int(rng.integers(6)))
    start, costs = session.length, []
    num_relaxed = 0
    for _ in range(120):
        if costs and rng.random() < 0.05:
            del costs[int(rng.integers(len(costs))) :]
            session.rewind(start + len(costs))
        row, draft = rng.normal(size=6), opinion(rng.dirichlet(np.ones(6)))
        pick = session.judge(Row(row), draft)
        strict = ExactVerifier(sampling).pick(Row(row), session.length)
        cost = max(0.0, np.float32(row)[strict] - np.float32(row)[pick.token]) / (temperature or 1.0)
        assert pick.loss == pytest.approx(cost if pick.is_relaxed else 0.0, abs=1e-5)
        session.accept(pick.token)
        costs.append(cost)
        num_relaxed += pick.is_relaxed
        assert sum(costs) <= budget * len(costs) + 1e-5
    assert (num_relaxed > 0) or budget < 0.3


@pytest.mark.parametrize(
    ("agreed", "expected"),
    [
        ([False] * 6, 1.0),
        ([True] * 9, 9.0),
        ([True] * 18, 9.0),
        ([True, True, False] * 4, 3.0),
        ([True] * 10 + [False], 11 / 2),
    ],
)
def test_the_accepted_length_is_that_of_chains_of_eight(agreed, expected):
    assert accepted_length(agreed) == expected


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("I'm sorry, but I can't assist with that request.", True),
        ("Sorry, no.", True),
        ("As an AI language model, I", True),
        ("I cannot say enough good things about Hawaii", True),
        ("Sure! Here is a story about a sorry cat.", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(text, is_refusal):
    """It may take a text for one that is none. That counts against relaxed mode only where exact mode has none."""
    assert bool(REFUSAL.match(text)) == is_refusal

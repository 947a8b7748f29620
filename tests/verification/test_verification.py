"""The sampler is the target's own distribution, and a function of logits, settings, seed and position alone."""

import math

import numpy as np
import pytest
from families import VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from prompting import DECISIONS, prompt_of
from rows import Row
from swarms import load_stages, model_swarm

from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import ModelError
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Sampling
from dsd_p2p.verification.exact import ExactVerifier, gumbel_noise, kept_tokens

# Chi-square values that a true sampler exceeds once in ten thousand draws, by degrees of freedom (any statistics table).
CRITICAL = {1: 15.14, 2: 18.42, 5: 25.74}


def deviates(counts, expected):
    statistic = ((counts - expected) ** 2 / expected).sum()
    return statistic > CRITICAL[len(counts) - 1]


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=0.5), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=3), [0, 1, 4]),
        (Sampling(temperature=1.0, top_p=0.8), [0, 1, 4]),
        (Sampling(temperature=2.0, top_k=4, top_p=0.6), [0, 1]),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_the_picks_are_distributed_as_the_target(sampling, kept, vary):
    logits = np.array([2.0, 1.5, -0.5, 0.0, 0.5, -1.0])
    scores = np.full(6, -np.inf)
    scores[kept] = logits[kept] / sampling.temperature
    num_draws = 20_000
    counts = np.zeros(6)
    for draw in range(num_draws):
        seed, position = (draw, 7) if vary == "seed" else (7, draw)
        verifier = ExactVerifier(
            Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=seed)
        )
        counts[verifier.pick(Row(logits), position)] += 1
    expected = softmax(scores) * num_draws
    assert counts[expected == 0].sum() == 0
    assert not deviates(counts[kept], expected[kept])


def test_the_chi_square_test_can_fail():
    """A sampler that forgets the temperature is caught by the same test."""
    logits = np.array([2.0, 1.5, -0.5, 0.0, 0.5, -1.0])
    counts = np.zeros(6)
    for seed in range(20_000):
        counts[ExactVerifier(Sampling(temperature=1.0, seed=seed)).pick(Row(logits), 7)] += 1
    assert deviates(counts, softmax(logits / 1.1) * 20_000)


def philox_words(key: tuple[int, int], count: int) -> list[int]:
    """Philox-4x64-10 written from its paper, Salmon et al. 2011, not from numpy."""
    mask = 2**64 - 1
    words: list[int] = []
    for block in range(1, -(-count // 4) + 1):
        counter, (low, high) = [block, 0, 0, 0], key
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
            counter = [
                (second >> 64) ^ counter[1] ^ low,
                second & mask,
                (first >> 64) ^ counter[3] ^ high,
                first & mask,
            ]
            low, high = (low + 0x9E3779B97F4A7C15) & mask, (high + 0xBB67AE8584CAA73B) & mask
        words += counter
    return words[:count]


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (42, 7), (2**63 - 1, 1 << 20)])
def test_the_noise_is_that_of_the_protocol_page(seed, position):
    uniform = [((word >> 11) + 0.5) * 2.0**-53 for word in philox_words((seed, position), 10)]
    expected = [-math.log(-math.log(u)) for u in uniform]
    assert gumbel_noise(seed, position, 10).tolist() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(
    scores=arrays(np.float64, st.integers(1, 40), elements=st.floats(-20, 20)),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1.0),
)
def test_what_is_kept_is_the_smallest_set_that_holds_the_mass(scores, top_k, top_p):
    kept = kept_tokens(scores, top_k, top_p)
    num_kept = int(kept.sum())
    assert 1 <= num_kept <= (min(top_k, len(scores)) if top_k else len(scores))
    assert scores[kept].min() >= scores[~kept].max(initial=-np.inf) or num_kept == len(scores)
    best = np.sort(scores)[::-1][: top_k or None]
    probs = softmax(best)
    if top_p < 1.0:
        assert probs[:num_kept].sum() >= top_p - 1e-9
        assert probs[: num_kept - 1].sum() < top_p + 1e-9


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(ModelError, match="not finite"):
        ExactVerifier(Sampling(temperature=1.0)).pick(Row([np.nan, 1.0]), 0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, seed=5),
        Sampling(temperature=1.3, top_k=20, seed=6),
        Sampling(temperature=1.0, top_p=0.7),
    ],
)
async def test_a_seed_gives_the_same_text_in_all_modes_and_stage_counts(tiny, sampling):
    source = find_model(str(tiny("llama")), NoProgress())
    texts = []
    for num_stages in (1, 2, 4):
        async with model_swarm(load_stages(source, num_stages), NgramDrafter()) as swarm:
            for decision in DECISIONS.values():
                tokens, _ = await swarm.write(prompt_of(9), 40, decision, sampling)
                texts.append(tokens)
    assert all(text == texts[0] for text in texts)
    assert len(set(texts[0])) > 10, "a text that samples"
    async with model_swarm(load_stages(source, 1), NgramDrafter()) as swarm:
        other = Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=99)
        tokens, _ = await swarm.write(prompt_of(9), 40, DECISIONS["plain"], other)
    assert tokens != texts[0]
    assert max(texts[0]) < VOCAB

"""How much a token matters: three signals from the two models' opinions (arXiv:2511.11733, section on adaptive verification).

The paper names the signals and calibrates thresholds on a small set; its formulas are not all public, so ours are given here.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import Relaxation, TokenId

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOpinion:
    """The drafter's likeliest tokens after a node, int64 `[m]`, and their log probabilities, float64 `[m]`, likeliest first."""

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float64]

    def including(self, token: TokenId) -> "DraftOpinion":
        """Return the opinion with `token` in it: one that was not told of is below all that were, and is lent the least of them."""
        if token in self.tokens:
            return self
        return DraftOpinion(
            tokens=np.append(self.tokens, token), logprobs=np.append(self.logprobs, self.logprobs.min())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What speaks for a candidate being key.

    ce_ratio: the target's surprise over the drafter's, `ln P_t(x) / ln P_d(x)`.
    prob_gap: `|P_d(x) - P_t(x)|`.
    norm_match: over the m tokens each model finds likeliest, the mass they share: `Σ min(P_t, P_d)` over those in both sets,
        divided by `Σ P_t` over the target's; 1 when the models agree.
    """

    ce_ratio: float
    prob_gap: float
    norm_match: float


def signals_of(target_logprobs: NDArray[np.float64], draft: DraftOpinion, candidate: TokenId) -> Signals:
    """Return the signals of `candidate`, one of the drafter's tokens.

    target_logprobs: float64 `[V]`, after the sampler's temperature.
    """
    draft_logprob = float(draft.logprobs[np.flatnonzero(draft.tokens == candidate)[0]])
    target_logprob = float(target_logprobs[candidate])
    num_compared = len(draft.tokens)
    target_best = np.argpartition(-target_logprobs, num_compared - 1)[:num_compared]
    in_both, _, draft_rows = np.intersect1d(target_best, draft.tokens, return_indices=True)
    shared = np.minimum(np.exp(target_logprobs[in_both]), np.exp(draft.logprobs[draft_rows])).sum()
    return Signals(
        ce_ratio=target_logprob / min(draft_logprob, -_EPSILON),
        prob_gap=abs(float(np.exp(draft_logprob) - np.exp(target_logprob))),
        norm_match=float(shared / np.exp(target_logprobs[target_best]).sum()),
    )


def is_decisive(signals: Signals, relaxation: Relaxation) -> bool:
    """True when any signal crosses its threshold: such a token is verified strictly."""
    return (
        signals.ce_ratio > relaxation.max_ce_ratio
        or signals.prob_gap > relaxation.max_prob_gap
        or signals.norm_match < relaxation.min_norm_match
    )

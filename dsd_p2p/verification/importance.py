"""Measures how much a token matters, by three signals (arXiv:2511.11733, section on adaptive verification).

The signals compare the two models' opinions. The paper names them and calibrates thresholds on a small set. Not all of
its formulas are public, so these are our own.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import Relaxation, TokenId

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOpinion:
    """The drafter's likeliest tokens after a node and their log probabilities, likeliest first.

    tokens: int64 `[m]`. logprobs: float64 `[m]`.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float64]

    def including(self, token: TokenId) -> "DraftOpinion":
        """Return the opinion with `token` in it.

        A token that was not reported is less likely than all that were; it gets the lowest reported log probability.
        """
        if token in self.tokens:
            return self
        return DraftOpinion(
            tokens=np.append(self.tokens, token), logprobs=np.append(self.logprobs, self.logprobs.min())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Signals that a candidate is decisive.

    ce_ratio: the target's surprise over the drafter's, `ln P_t(x) / ln P_d(x)`.
    prob_gap: `|P_d(x) - P_t(x)|`.
    norm_match: the mass that the models share among the m tokens that each finds likeliest: `Σ min(P_t, P_d)` over the
        tokens in both sets, divided by `Σ P_t` over the target's set; 1 when the models agree.
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
    """Return True if any signal crosses its threshold; such a token is verified strictly."""
    return (
        signals.ce_ratio > relaxation.max_ce_ratio
        or signals.prob_gap > relaxation.max_prob_gap
        or signals.norm_match < relaxation.min_norm_match
    )

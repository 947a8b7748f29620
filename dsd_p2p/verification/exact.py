"""Exact verification: picks the target's own token, whatever was drafted.

Greedy decoding takes the argmax. Sampling uses the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014,
arXiv:1411.0030) on the logits, divided by the temperature and cut by top-k, then top-p: `argmax(logit + noise)` is
distributed as the softmax. The noise is a pure function of (seed, position, token id). So the pick does not depend on
the draft, on the window, or on where the model is split.
"""

import math

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import ModelError
from dsd_p2p.types import Sampling, TokenId
from dsd_p2p.verification.base import Pick, TargetView
from dsd_p2p.verification.importance import DraftOpinion


def gumbel_noise(
    seed: int, position: int, vocab_size: int, tokens: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return standard Gumbel noise, float64 `[V]`; entry i belongs to token i. With `tokens` `[m]`, only theirs.

    The source is Philox-4x64-10 (Salmon et al. 2011) with key (seed, position) and a counter from 1. Each word w
    of 64 bits gives `u = (floor(w / 2^11) + 0.5) / 2^53` and the noise `-ln(-ln(u))`.
    """
    words = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(vocab_size)
    if tokens is not None:
        words = words[tokens]
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def kept_tokens(scores: NDArray[np.float64], top_k: int, top_p: float) -> NDArray[np.bool_]:
    """Return which tokens survive top-k, then top-p (Holtzman et al. 2020), bool `[V]`.

    scores: logits divided by the temperature, float64 `[V]`. Among equal scores the lower id comes first.
    """
    order = np.argsort(-scores, kind="stable")
    if 0 < top_k < len(order):
        order = order[:top_k]
    if top_p < 1.0:
        probs = np.exp(scores[order] - scores[order[0]])
        mass_before = np.cumsum(probs) - probs
        order = order[mass_before < top_p * probs.sum()]
    kept = np.zeros(len(scores), np.bool_)
    kept[order] = True
    return kept


class ExactSession:
    """One text of an `ExactVerifier`. Its length is its only state: the noise does not depend on earlier tokens."""

    def __init__(self, verifier: "ExactVerifier", num_prompt: int) -> None:
        self._verifier = verifier
        self._num_prompt = num_prompt
        self.length = num_prompt

    def judge(self, view: TargetView, draft: DraftOpinion | None) -> Pick:
        """Return the target's token and ignore the drafter's opinion. Raises as `VerifierSession.judge` does."""
        return Pick(self._verifier.pick(view, self.length), is_relaxed=False)

    def gap(self, view: TargetView, pick: TokenId, claimed: TokenId) -> float:
        """See `VerifierSession`."""
        return self._verifier.gap_from(view.logits().astype(np.float64), self.length, pick, claimed)

    def accept(self, token: TokenId) -> None:
        """See `VerifierSession`."""
        self.length += 1

    def rewind(self, length: int) -> None:
        """See `VerifierSession`."""
        assert self._num_prompt <= length <= self.length, "a text is rewound to what it was"
        self.length = length


class ExactVerifier:
    """A rule that picks the target's own token under `sampling`."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def open(self, num_prompt: int) -> ExactSession:
        """Start a text whose first `num_prompt` tokens are its prompt."""
        return ExactSession(self, num_prompt)

    def pick(self, view: TargetView, position: int) -> TokenId:
        """Return the target's token for `position`.

        Raises:
            ModelError: the logits are not finite.
        """
        if self._sampling.is_greedy:
            return view.argmax()
        return self.pick_from(view.logits().astype(np.float64), position)

    def pick_from(self, logits: NDArray[np.float64], position: int, min_p: float = 0.0) -> TokenId:
        """Return the token for `position`, given logits `[V]`.

        min_p: cut tokens that are less likely than this share of the likeliest.

        Raises:
            ModelError: the largest logit, divided by the temperature, is not finite.
        """
        sampling = self._sampling
        if sampling.is_greedy:
            return int(np.argmax(logits))
        scores = logits / sampling.temperature
        if not np.isfinite(scores.max()):
            raise ModelError(f"the target's logits at position {position} are not finite: check its weights and dtype")
        noisy = scores + gumbel_noise(sampling.seed, position, len(scores))
        noisy[~self._kept(scores, min_p)] = -np.inf
        return int(np.argmax(noisy))

    def gap_from(
        self, logits: NDArray[np.float64], position: int, pick: TokenId, claimed: TokenId, min_p: float = 0.0
    ) -> float:
        """Return how far the logits `[V]` would have to be off for `claimed` to be picked instead of `pick`.

        With sampling, each token that beats `claimed` would have to lose to it, or to fall to the cut of top-k, top-p or
        `min_p`; and `claimed` would have to rise to the cut. After Token-DiFR (arXiv:2511.20621).
        """
        if claimed >= len(logits) or not np.isfinite(logits[claimed]):
            return math.inf
        sampling = self._sampling
        if sampling.is_greedy:
            return float(logits[pick] - logits[claimed])
        scores = logits / sampling.temperature
        noisy = scores + gumbel_noise(sampling.seed, position, len(scores))
        kept = self._kept(scores, min_p)
        cut = scores[kept].min()
        better = np.flatnonzero(kept & (noisy > noisy[claimed]))
        needed = np.minimum(noisy[better] - noisy[claimed], scores[better] - cut)
        return float(sampling.temperature * max(needed.max(initial=0.0), cut - scores[claimed], 0.0))

    def _kept(self, scores: NDArray[np.float64], min_p: float) -> NDArray[np.bool_]:
        sampling = self._sampling
        kept = np.ones(len(scores), np.bool_)
        if sampling.top_k or sampling.top_p < 1.0:
            kept = kept_tokens(scores, sampling.top_k, sampling.top_p)
        if min_p > 0.0:
            kept &= scores >= scores.max() + np.log(min_p)
        return kept

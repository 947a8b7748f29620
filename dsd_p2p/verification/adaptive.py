"""Relaxed verification: a drafted token that is not decisive may stand although the target would have written another.

Rule `importance` (arXiv:2511.11733) picks from the blend `softmax((1 - τ) ln P_t + τ ln P_d)`, over the drafter's
tokens and the target's own pick. The token stands if it is not decisive. Rule `margin` (cf. arXiv:2601.15498) takes the
drafter's first choice if it is the target's runner-up and at most a margin of logits behind. Both rules refuse
overshoot: a token that the drafter finds much likelier than the target does.

A budget bounds the harm. A token costs what the target finds it less likely than its own, in nats. It stands only if all
that the text has cost so far, and this token, stay within the budget for each token written. So no beginning of a text
costs more than its budget.

Two kinds of tokens are strict whatever their probabilities, because of what they lead to. The first `STRICT_START` tokens
decide what answer it will be, a refusal among them. And no token may replace one that ends the answer, or end it early.
"""

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.types import Relaxation, RelaxationRule, Sampling, TokenId
from dsd_p2p.verification.base import Pick, TargetView
from dsd_p2p.verification.exact import ExactSession, ExactVerifier, gumbel_noise, kept_tokens
from dsd_p2p.verification.importance import DraftOpinion, is_decisive, signals_of

STRICT_START = 8
"""Tokens at the beginning of an answer that are the target's own."""


class AdaptiveSession:
    """One text of an `AdaptiveVerifier`; the exact session inside it holds the text's state."""

    def __init__(self, verifier: "AdaptiveVerifier", exact: ExactSession) -> None:
        self._verifier = verifier
        self._exact = exact
        self._strict_until = exact.length + STRICT_START
        self._costs: dict[int, float] = {}
        # The first position that was decided here; earlier ones were given, and their costs are not known.
        self._decided_from: int | None = None
        self._last: Pick | None = None

    @property
    def length(self) -> int:
        """See `VerifierSession`."""
        return self._exact.length

    def judge(self, view: TargetView, draft: DraftOpinion | None) -> Pick:
        """Return the token for the next position; raises as `VerifierSession.judge` does."""
        if self._decided_from is None:
            self._decided_from = self.length
        num_decided = self.length - self._decided_from + 1
        left = self._verifier.budget * num_decided - sum(self._costs.values())
        is_strict = self.length < self._strict_until
        self._last = self._verifier.pick(view, self.length, None if is_strict else draft, left)
        return self._last

    def gap(self, view: TargetView, pick: TokenId, claimed: TokenId) -> float:
        """See `VerifierSession`."""
        return self._exact.gap(view, pick, claimed)

    def accept(self, token: TokenId) -> None:
        """See `VerifierSession`."""
        last, self._last = self._last, None
        if last is not None and last.token == token and last.loss:
            self._costs[self.length] = last.loss
        self._exact.accept(token)

    def rewind(self, length: int) -> None:
        """See `VerifierSession`."""
        self._exact.rewind(length)
        self._last = None
        self._costs = {position: cost for position, cost in self._costs.items() if position < length}
        if self._decided_from is not None:
            self._decided_from = min(self._decided_from, length)


class AdaptiveVerifier:
    """A rule that picks the target's own token, or a drafted token that the relaxation lets stand.

    stop_tokens: those that end the text. They neither replace another token nor are replaced.
    """

    def __init__(self, sampling: Sampling, relaxation: Relaxation, stop_tokens: Collection[TokenId] = ()) -> None:
        self._exact = ExactVerifier(sampling)
        self._stop_tokens = frozenset(stop_tokens)
        self._sampling = sampling
        self._relaxation = relaxation

    @property
    def budget(self) -> float:
        """The most that a text may lose, in nats a token."""
        return self._relaxation.budget

    def open(self, num_prompt: int) -> "AdaptiveSession":
        """Start a text whose first `num_prompt` tokens are its prompt."""
        return AdaptiveSession(self, self._exact.open(num_prompt))

    def pick(self, view: TargetView, position: int, draft: DraftOpinion | None, left: float = math.inf) -> Pick:
        """Return the token for `position`; without a drafter's opinion it is the exact one.

        left: nats that a token may cost here.

        Raises:
            ModelError: the logits are not finite.
            RemoteProtocolError: a token of the drafter's is outside the vocabulary or occurs twice.
        """
        strict = self._exact.pick(view, position)
        if draft is None or draft.tokens[0] == strict or strict in self._stop_tokens:
            return Pick(strict, is_relaxed=False)
        temperature = self._sampling.temperature or 1.0
        scores = view.logits().astype(np.float64) / temperature
        if draft.tokens.max() >= len(scores) or len(set(draft.tokens.tolist())) != len(draft.tokens):
            raise RemoteProtocolError("draft tokens", "some outside or twice", f"distinct, below {len(scores)}")
        target_logprobs = scores - np.logaddexp.reduce(scores)
        draft = draft.including(strict)
        candidate = self._propose(target_logprobs, draft, position, strict)
        if candidate is None or candidate in self._stop_tokens:
            return Pick(strict, is_relaxed=False)
        loss = max(0.0, float(target_logprobs[strict] - target_logprobs[candidate]))
        if loss > left or self._is_overshoot(target_logprobs, draft, candidate):
            return Pick(strict, is_relaxed=False)
        return Pick(candidate, is_relaxed=True, loss=loss)

    def _propose(
        self, target_logprobs: NDArray[np.float64], draft: DraftOpinion, position: int, strict: TokenId
    ) -> TokenId | None:
        """Return the token that may stand instead of `strict`, or None."""
        relaxation, sampling = self._relaxation, self._sampling
        if relaxation.rule is RelaxationRule.MARGIN:
            first = int(draft.tokens[0])
            best, second = np.partition(target_logprobs, -2)[:-3:-1]
            is_close_runner_up = target_logprobs[first] >= second and best - second <= relaxation.max_margin
            return first if is_close_runner_up and first != strict else None
        blend = (1 - relaxation.tau) * target_logprobs[draft.tokens] + relaxation.tau * draft.logprobs
        if not sampling.is_greedy:
            blend = blend + gumbel_noise(sampling.seed, position, len(target_logprobs), draft.tokens)
        if sampling.top_k or sampling.top_p < 1.0:
            # The drafter must not bring back tokens that the sampler cut.
            blend[~kept_tokens(target_logprobs, sampling.top_k, sampling.top_p)[draft.tokens]] = -np.inf
        row = int(np.argmax(blend))
        candidate = int(draft.tokens[row])
        if blend[draft.tokens == strict][0] >= blend[row]:
            return None
        return None if is_decisive(signals_of(target_logprobs, draft, candidate), relaxation) else candidate

    def _is_overshoot(self, target_logprobs: NDArray[np.float64], draft: DraftOpinion, candidate: TokenId) -> bool:
        draft_logprob = draft.logprobs[np.flatnonzero(draft.tokens == candidate)[0]]
        return bool(draft_logprob - target_logprobs[candidate] > np.log(self._relaxation.max_overshoot))

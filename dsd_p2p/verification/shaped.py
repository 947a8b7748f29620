"""Exact verification of shaped or constrained text: changes the target's logits before the pick.

The changes are functions of the request and of the answer so far. So the text stays a function of the prompt, the
settings and the seed, whatever was drafted. Penalties follow OpenAI (presence, frequency) and Keskar et al. 2019,
arXiv:1909.05858 (repetition); `min_p` follows Nguyen et al. 2024, arXiv:2407.01082. A constraint removes all tokens with
which the text could no longer become one that it allows.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.types import Shaping, TextRequest, TokenId
from dsd_p2p.verification.base import Pick, TargetView
from dsd_p2p.verification.exact import ExactVerifier
from dsd_p2p.verification.grammar import Grammar, Matcher
from dsd_p2p.verification.importance import DraftOpinion

UNSHAPED = Shaping()


class ShapedVerifier:
    """A rule that picks the target's own token from changed logits. grammar: of the text's constraint, if it has one."""

    def __init__(self, text: TextRequest, grammar: Grammar | None) -> None:
        self.exact = ExactVerifier(text.sampling)
        self.shaping = text.shaping or UNSHAPED
        self.is_greedy = text.sampling.is_greedy
        self.stop_tokens = np.array(text.stop_tokens, np.int64)
        self.seen = np.array(self.shaping.seen, np.int64)
        self.grammar = grammar

    def open(self, num_prompt: int) -> "ShapedSession":
        """Start a text whose first `num_prompt` tokens are its prompt."""
        return ShapedSession(self, num_prompt)


class ShapedSession:
    """One text of a `ShapedVerifier`: its answer so far, and its place in the constraint."""

    def __init__(self, verifier: ShapedVerifier, num_prompt: int) -> None:
        self._verifier = verifier
        self._num_prompt = num_prompt
        self._answer: list[TokenId] = []
        self._counts: Counter[TokenId] = Counter()
        self._matcher: Matcher | None = None
        self._is_plain = verifier.shaping == UNSHAPED

    @property
    def length(self) -> int:
        """See `VerifierSession`."""
        return self._num_prompt + len(self._answer)

    def _prepare(self) -> None:
        """Compile the constraint.

        Raises:
            ConfigError: it is wrong, or too large.
        """
        if self._matcher is None and self._verifier.grammar is not None:
            self._matcher = self._verifier.grammar.start()

    def judge(self, view: TargetView, draft: DraftOpinion | None) -> Pick:
        """Return the target's token and ignore the drafter's opinion.

        Raises:
            ConfigError: the constraint is wrong or too large, or no token goes on within it.
            ModelError: the logits are not finite.
        """
        self._prepare()
        matcher = None if self._matcher is None or self._matcher.is_over else self._matcher
        if self._is_plain and self._verifier.is_greedy:
            best = view.argmax()
            if matcher is None or matcher.allows(best):
                return Pick(best, is_relaxed=False)
        logits = self._logits(view, matcher)
        token = self._verifier.exact.pick_from(logits, self.length, self._verifier.shaping.min_p)
        return Pick(token, is_relaxed=False)

    def gap(self, view: TargetView, pick: TokenId, claimed: TokenId) -> float:
        """See `VerifierSession`."""
        matcher = None if self._matcher is None or self._matcher.is_over else self._matcher
        logits = self._logits(view, matcher)
        return self._verifier.exact.gap_from(logits, self.length, pick, claimed, self._verifier.shaping.min_p)

    def accept(self, token: TokenId) -> None:
        """See `VerifierSession`.

        Raises:
            ConfigError: the constraint is wrong, or too large.
            RemoteProtocolError: the constraint does not allow this token.
        """
        self._prepare()
        if self._matcher is not None:
            self._matcher.advance(token)
        self._answer.append(token)
        self._counts[token] += 1

    def rewind(self, length: int) -> None:
        """See `VerifierSession`."""
        num_kept = length - self._num_prompt
        assert 0 <= num_kept <= len(self._answer), "a text is rewound to what it was"
        if self._matcher is not None:
            self._matcher.rewind(len(self._answer) - num_kept)
        self._counts.subtract(self._answer[num_kept:])
        del self._answer[num_kept:]

    def _logits(self, view: TargetView, matcher: Matcher | None) -> NDArray[np.float64]:
        """Return the logits that the target picks from, `[V]`.

        Raises:
            ConfigError: no token goes on within the constraint.
            ModelError: they are not finite.
        """
        logits = self._shaped(view.logits().astype(np.float64))
        if not np.isfinite(logits.max()):
            raise ModelError(f"the target's logits at position {self.length} are not finite: check weights and dtype")
        if matcher is not None:
            logits[~matcher.allowed()[: len(logits)]] = -np.inf
            if not np.isfinite(logits.max()):
                raise ConfigError("the constraint allows no token here: make it simpler, or lower min_tokens")
        return logits

    def _shaped(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Change the logits, `[V]`, in place."""
        shaping = self._verifier.shaping
        if self._is_plain:
            return logits
        known = [(token, count) for token, count in self._counts.items() if count > 0 and token < len(logits)]
        written, counts = np.array(known, np.int64).reshape(-1, 2).T
        if shaping.repetition != 1.0:
            is_seen = np.zeros(len(logits), np.bool_)
            is_seen[self._verifier.seen[self._verifier.seen < len(logits)]] = True
            is_seen[written] = True
            seen = np.flatnonzero(is_seen)
            logits[seen] = np.where(
                logits[seen] > 0, logits[seen] / shaping.repetition, logits[seen] * shaping.repetition
            )
        logits[written] -= shaping.presence + shaping.frequency * counts
        for token, bias in shaping.bias:
            if token < len(logits):
                logits[token] += bias
        if len(self._answer) < shaping.min_tokens:
            logits[self._verifier.stop_tokens[self._verifier.stop_tokens < len(logits)]] = -np.inf
        return logits

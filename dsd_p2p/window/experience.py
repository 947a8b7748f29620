"""Corrects predicted rates by measured ones, for the adaptive policies.

Two things correct a prediction, here called a promise: how well its mode kept its promises lately (`kept_share`), and
the measured rate of the same window (`pulled`). Where too little is known, a trial measures it (`Trials`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dsd_p2p.window.base import Decision, MeasuredRate, Mode, Observation
from dsd_p2p.window.static import PLAIN

_SURE_MARGIN = 1.5
"""Plain decoding is measured too where speculation leads it by less than this factor."""

TRIAL_TOKENS = 6
"""Tokens that a window must write before its measured rate counts; also the length of a trial."""

_FORGETTING = 0.99
"""Share of the trust in a measured rate that remains after each token from other windows, because the text changes."""

_FIRST_TRIAL_TOKENS = 24
"""Plain tokens after which barely tried speculation gets a trial, whatever it promises and twice as long as usual."""

_DOUBT_TOKENS = 64
"""Tokens after which plain decoding is tried again while speculation is slower than the modelled plain decoding."""

_FIRST_RETRY_TOKENS, _MAX_RETRY_TOKENS = 256, 4096
"""Plain tokens before speculation is tried again: the first number, doubled by each failed trial up to the second."""

_PLAIN_SHARE = 64
"""Plain decoding is measured again once all windows have written this many times its tokens, so it stays under 2 %."""

_FULL_TRUST_TOKENS = 24
"""Tokens after which a measured rate counts fully: four trials."""

_KEPT_BOUNDS = (0.3, 1.5)
"""Limits on the share of its promises that a mode is taken to keep: one bad stretch must not rule it out for good."""


def pulled(decision: Decision, promise: float, observation: Observation) -> float:
    """Return the promise in tokens/s, pulled towards the recent measured rate of the same window."""
    measured = observation.measured.get(decision.kind)
    if measured is None:
        return promise
    share = trust(measured)
    return math.exp((1 - share) * math.log(promise) + share * math.log(max(measured.tokens_per_s, 1e-9)))


class Trials:
    """The trials of a few tokens: of plain decoding at a narrow lead, of speculation after long plain decoding."""

    def __init__(self) -> None:
        self._trial: Decision | None = None
        self._ends_at = 0

    def running(self, observation: Observation) -> Decision | None:
        """Return the trial under way, or None."""
        if self._trial is not None and _num_tokens(observation) >= self._ends_at:
            self._trial = None
        return self._trial

    def next(
        self, best: Decision, rates: Mapping[str, float], observation: Observation, candidates: Sequence[Decision]
    ) -> Decision | None:
        """Return the window to try instead of `best`, or None. rates: expected tokens/s by `Decision.kind`."""
        total = _num_tokens(observation)
        plain = observation.measured.get(PLAIN.kind)
        num_plain = plain.num_tokens if plain else 0
        if best.mode is Mode.PLAIN:
            self._trial = _retry(rates, candidates, num_plain, total)
        else:
            lead = rates[best.kind] / rates[PLAIN.kind]
            is_due = num_plain < TRIAL_TOKENS or total > _PLAIN_SHARE * num_plain or _is_doubtful(best, observation)
            is_tried = lead < _SURE_MARGIN and is_due and total >= TRIAL_TOKENS
            self._trial = (
                replace(PLAIN, reason=f"trial of plain: speculation leads only by a factor of {lead:.2f}")
                if is_tried
                else None
            )
        is_first = best.mode is Mode.PLAIN and total - num_plain < TRIAL_TOKENS
        self._ends_at = total + (2 * TRIAL_TOKENS if is_first else TRIAL_TOKENS) + 1
        return self._trial


def _retry(rates: Mapping[str, float], candidates: Sequence[Decision], num_plain: int, total: int) -> Decision | None:
    # Trials so far, each `TRIAL_TOKENS` long. The wait doubles with each failed trial.
    num_trials = (total - num_plain) // TRIAL_TOKENS
    wait = min(_FIRST_RETRY_TOKENS * 2 ** min(num_trials, 10), _MAX_RETRY_TOKENS)
    speculative = [each for each in candidates if each.mode is not Mode.PLAIN]
    best = max(speculative, key=lambda each: rates[each.kind], default=None)
    if best is None:
        return None
    if total - num_plain < TRIAL_TOKENS and num_plain >= _FIRST_TRIAL_TOKENS:
        # The first few passes and drafts may mislead, and what is hardly tried stays unknown.
        return replace(best, reason="trial: speculation is hardly measured yet")
    is_promising = rates[best.kind] > rates[PLAIN.kind]
    return (
        replace(best, reason="trial: speculation may be faster by now") if num_plain >= wait and is_promising else None
    )


def _is_doubtful(best: Decision, observation: Observation) -> bool:
    """True if `best` is slower than the latency model says plain decoding is, and plain was not tried for long."""
    plain, measured = observation.measured.get(PLAIN.kind), observation.measured.get(best.kind)
    if plain is None or measured is None or measured.num_tokens < TRIAL_TOKENS:
        return False
    return plain.num_tokens_since > _DOUBT_TOKENS and measured.tokens_per_s * observation.traversal_s(1) < 1


def _num_tokens(observation: Observation) -> int:
    return sum(rate.num_tokens for rate in observation.measured.values())


def trust(measured: MeasuredRate) -> float:
    """Return the weight of a measured rate against a promise, 0 to 1.

    It grows with the tokens that the rate comes from and falls with the tokens of other windows since.
    """
    if measured.num_tokens < TRIAL_TOKENS:
        return 0.0
    return min(1.0, measured.num_tokens / _FULL_TRUST_TOKENS) * _FORGETTING**measured.num_tokens_since


def kept_share(mode: Mode, observation: Observation, promise: Callable[[Decision], float]) -> float:
    """Return measured over promised speed of the mode's latest window, weighted by trust; 1 if nothing is known."""
    if mode is Mode.PLAIN:
        return 1.0
    for measured in sorted(observation.measured.values(), key=lambda each: each.num_tokens_since):
        if measured.decision.mode is mode:
            ratio = measured.tokens_per_s / promise(measured.decision)
            return math.pow(max(_KEPT_BOUNDS[0], min(_KEPT_BOUNDS[1], ratio)), trust(measured))
    return 1.0

"""What windows were seen to write, against what they promised; shared by the policies that adapt.

Two things correct a promise: how its mode kept promises lately (`kept_share`), and what these very windows wrote (`pulled`). Where
too little is known, a trial measures it (`Trials`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dsd_p2p.window.base import Decision, MeasuredRate, Mode, Observation
from dsd_p2p.window.static import PLAIN

_SURE_MARGIN = 1.5
"""Where speculation leads plain by less than this, plain is measured too."""

TRIAL_TOKENS = 6
"""Tokens a mode writes before its measured rate counts, and that a trial lasts."""

_FORGETTING = 0.99
"""What is left of the trust in a measured rate after each token that other windows wrote: texts differ."""

_FIRST_TRIAL_TOKENS = 24
"""Plain tokens after which speculation that hardly was tried is, whatever it promises, and for twice as long as otherwise."""

_DOUBT_TOKENS = 64
"""Tokens after which plain decoding is tried again where speculation falls behind what the latency model says of it."""

_FIRST_RETRY_TOKENS, _MAX_RETRY_TOKENS = 256, 4096
"""Plain tokens before speculation is tried again: twice as many after each trial that failed, up to the second number."""

_PLAIN_SHARE = 64
"""Plain decoding is measured again once all windows have written this many times the tokens it wrote: under 2 % of the text."""

_FULL_TRUST_TOKENS = 24
"""Tokens after which a measured rate counts fully: four trials."""

_KEPT_BOUNDS = (0.3, 1.5)
"""A mode is never taken to keep less, or more, of its promises: one bad stretch must not rule it out for good."""


def pulled(decision: Decision, promise: float, observation: Observation) -> float:
    """Return a promise in tokens/s, pulled towards what these very windows wrote lately."""
    measured = observation.measured.get(decision.kind)
    if measured is None:
        return promise
    share = trust(measured)
    return math.exp((1 - share) * math.log(promise) + share * math.log(max(measured.tokens_per_s, 1e-9)))


class Trials:
    """Windows worth a few tokens of measuring: plain beside a narrow lead, speculation after a long time without."""

    def __init__(self) -> None:
        self._trial: Decision | None = None
        self._ends_at = 0

    def running(self, observation: Observation) -> Decision | None:
        """Return the trial that goes on, if one does."""
        if self._trial is not None and _num_tokens(observation) >= self._ends_at:
            self._trial = None
        return self._trial

    def next(
        self, best: Decision, rates: Mapping[str, float], observation: Observation, candidates: Sequence[Decision]
    ) -> Decision | None:
        """Return what to try instead of `best`, None for nothing. rates: expected tokens/s by `Decision.kind`."""
        total = _num_tokens(observation)
        plain = observation.measured.get(PLAIN.kind)
        num_plain = plain.num_tokens if plain else 0
        if best.mode is Mode.PLAIN:
            self._trial = _retry(rates, candidates, num_plain, total)
        else:
            lead = rates[best.kind] / rates[PLAIN.kind]
            is_due = num_plain < TRIAL_TOKENS or total > _PLAIN_SHARE * num_plain or _is_doubtful(best, observation)
            is_tried = lead < _SURE_MARGIN and is_due and total >= TRIAL_TOKENS
            self._trial = replace(PLAIN, reason=f"trial: speculation leads by {lead:.2f} only") if is_tried else None
        is_first = best.mode is Mode.PLAIN and total - num_plain < TRIAL_TOKENS
        self._ends_at = total + (2 * TRIAL_TOKENS if is_first else TRIAL_TOKENS) + 1
        return self._trial


def _retry(rates: Mapping[str, float], candidates: Sequence[Decision], num_plain: int, total: int) -> Decision | None:
    # Trials so far, each `TRIAL_TOKENS` long: the wait doubles with every one that failed.
    num_trials = (total - num_plain) // TRIAL_TOKENS
    wait = min(_FIRST_RETRY_TOKENS * 2 ** min(num_trials, 10), _MAX_RETRY_TOKENS)
    speculative = [each for each in candidates if each.mode is not Mode.PLAIN]
    best = max(speculative, key=lambda each: rates[each.kind], default=None)
    if best is None:
        return None
    if total - num_plain < TRIAL_TOKENS and num_plain >= _FIRST_TRIAL_TOKENS:
        # What the first few passes and drafts were like may mislead; what was hardly tried stays unknown.
        return replace(best, reason="trial: it was hardly measured")
    is_promising = rates[best.kind] > rates[PLAIN.kind]
    return replace(best, reason="trial: it may have become faster") if num_plain >= wait and is_promising else None


def _is_doubtful(best: Decision, observation: Observation) -> bool:
    """True where it writes less than plain decoding would by the latency model, and that was not tried for long."""
    plain, measured = observation.measured.get(PLAIN.kind), observation.measured.get(best.kind)
    if plain is None or measured is None or measured.num_tokens < TRIAL_TOKENS:
        return False
    return plain.num_tokens_since > _DOUBT_TOKENS and measured.tokens_per_s * observation.traversal_s(1) < 1


def _num_tokens(observation: Observation) -> int:
    return sum(rate.num_tokens for rate in observation.measured.values())


def trust(measured: MeasuredRate) -> float:
    """Return how much a measured rate counts against a promise, 0 to 1: more with its tokens, less with those of others since."""
    if measured.num_tokens < TRIAL_TOKENS:
        return 0.0
    return min(1.0, measured.num_tokens / _FULL_TRUST_TOKENS) * _FORGETTING**measured.num_tokens_since


def kept_share(mode: Mode, observation: Observation, promise: Callable[[Decision], float]) -> float:
    """Return measured over promised speed of what the mode wrote lately; 1 where nothing is known."""
    if mode is Mode.PLAIN:
        return 1.0
    for measured in sorted(observation.measured.values(), key=lambda each: each.num_tokens_since):
        if measured.decision.mode is mode:
            ratio = measured.tokens_per_s / promise(measured.decision)
            return math.pow(max(_KEPT_BOUNDS[0], min(_KEPT_BOUNDS[1], ratio)), trust(measured))
    return 1.0

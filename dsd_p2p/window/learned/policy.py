"""The learned policy: network ratings, smoothed, corrected by measurements and bounded by the latency model."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.window.analytic import predicted_tokens_per_s
from dsd_p2p.window.base import Decision, MeasuredRate, Mode, Observation
from dsd_p2p.window.catalogue import CATALOGUE
from dsd_p2p.window.experience import Trials, kept_share, pulled, trust
from dsd_p2p.window.learned.features import features
from dsd_p2p.window.learned.network import Network
from dsd_p2p.window.static import PLAIN

_SMOOTHING = 0.4
"""Weight of the newest ratings (arXiv:2511.21669)."""

_SWITCH_AFTER = 2
"""Decisions in a row that must favour another mode before the policy switches to it (arXiv:2511.21669)."""

_KEEP_MARGIN, _PLAIN_MARGIN = 1.1, 1.03
"""Lead that another window needs; smaller leads are noise. Plain decoding needs less lead: it needs no drafter."""

_GUARD = math.log(1.5)
"""Maximum distance of a rating from the latency model's: far from its training data a network errs without limit."""


class LearnedPolicy:
    """A policy that takes the best window of the catalogue. One instance serves one request.

    All it knows about the route is in the observations. modes: the modes that it may choose besides plain.
    """

    def __init__(self, network: Network, modes: frozenset[Mode] = frozenset({Mode.SYNC, Mode.CONTINUOUS})) -> None:
        self._network = network
        self._arms = [
            (index, decision)
            for index, decision in enumerate(CATALOGUE.values())
            if decision.mode in modes or decision.mode is Mode.PLAIN
        ]
        self._ratings: NDArray[np.float32] | None = None
        self._current = PLAIN
        self._wanted_mode = Mode.PLAIN
        self._num_wanted = 0
        self._trials = Trials()

    def decide(self, observation: Observation) -> Decision:
        """Return the window with the best expected rate, or plain until the first verdict shows the route's cost."""
        if not observation.stages:
            return replace(PLAIN, reason="nothing measured yet")
        if (running := self._trials.running(observation)) is not None:
            return running
        newest = self._network.rate(features(observation, self._current))
        is_first = self._ratings is None
        steadied = newest if self._ratings is None else _SMOOTHING * newest + (1 - _SMOOTHING) * self._ratings
        self._ratings = steadied
        rates = self._rates(steadied, observation)
        best = max((decision for _, decision in self._arms), key=lambda decision: rates[decision.kind])
        if best.kind == self._current.kind:
            self._num_wanted = 0
        elif not is_first and not self._is_worth_it(best, rates):
            best = self._current
        trial = self._trials.next(best, rates, observation, [decision for _, decision in self._arms])
        if trial is not None or best.kind != self._current.kind:
            reason = f"{rates[best.kind]:.1f} tokens/s expected, plain {rates[PLAIN.kind]:.1f}"
            self._current = trial or replace(best, reason=reason)
        return self._current

    def _rates(self, ratings: NDArray[np.float32], observation: Observation) -> dict[str, float]:
        """Return the expected tokens/s by `Decision.kind`.

        The ratings are relative to plain decoding. Its speed is best derived from the current window: stages that share
        cores slow down while all are busy, so their times then say little about plain decoding.
        """
        plain_s = observation.traversal_s(1)
        guarded = {
            decision.kind: self._guarded(decision, float(ratings[index]), plain_s, observation)
            for index, decision in self._arms
        }
        log_plain = -math.log(plain_s)
        if (measured := observation.measured.get(self._current.kind)) is not None:
            implied = math.log(max(measured.tokens_per_s, 1e-9)) - guarded[self._current.kind]
            log_plain += trust(measured) * (implied - log_plain)

        def promise(decision: Decision) -> float:
            return math.exp(log_plain + guarded.get(decision.kind, 0.0))

        # A mode that lost to plain decoding is trusted again only once that result has faded.
        plain = observation.measured.get(PLAIN.kind)
        has_lost = plain is not None and self._current.mode is Mode.PLAIN and _lost(plain, observation)
        shares = {mode: min(1.0, kept_share(mode, observation, promise)) if has_lost else 1.0 for mode in Mode}
        return {
            decision.kind: pulled(decision, promise(decision) * shares[decision.mode], observation)
            for _, decision in self._arms
        }

    def _guarded(self, decision: Decision, rating: float, plain_s: float, observation: Observation) -> float:
        """Return the mean of the network's bounded rating and the latency model's, both relative to plain decoding."""
        if decision.mode is Mode.PLAIN:
            return 0.0
        modelled = math.log(predicted_tokens_per_s(decision, observation) * plain_s)
        return (max(modelled - _GUARD, min(modelled + _GUARD, rating)) + modelled) / 2

    def _is_worth_it(self, best: Decision, rates: dict[str, float]) -> bool:
        """True if the lead is more than noise and a new mode has been favoured for long enough."""
        if best.mode is not self._wanted_mode:
            self._wanted_mode, self._num_wanted = best.mode, 0
        self._num_wanted += 1
        is_settled = best.mode is self._current.mode or self._num_wanted >= _SWITCH_AFTER
        margin = _PLAIN_MARGIN if best.mode is Mode.PLAIN else _KEEP_MARGIN
        return rates[best.kind] > margin * rates[self._current.kind] and is_settled


def _lost(plain: MeasuredRate, observation: Observation) -> bool:
    """True if the latest speculative window was slower than plain decoding."""
    others = [each for each in observation.measured.values() if each.decision.mode is not Mode.PLAIN]
    latest = min(others, key=lambda each: each.num_tokens_since, default=None)
    return latest is not None and latest.tokens_per_s < plain.tokens_per_s

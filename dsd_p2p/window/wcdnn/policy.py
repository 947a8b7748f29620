"""The learned policy: the network's ratings, steadied, corrected by what was measured, and kept on a leash by the latency model."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.window.analytic import Trials, corrected, predicted_tokens_per_s
from dsd_p2p.window.base import Decision, Mode, Observation
from dsd_p2p.window.catalogue import CATALOGUE
from dsd_p2p.window.static import PLAIN
from dsd_p2p.window.wcdnn.features import features
from dsd_p2p.window.wcdnn.network import Network

_SMOOTHING = 0.4
"""Weight of the newest ratings (arXiv:2511.21669)."""

_SWITCH_AFTER = 2
"""Decisions in a row that must want another mode before it is taken (arXiv:2511.21669)."""

_KEEP_MARGIN = 0.05
"""How much better another window must promise to be: smaller differences are noise."""

_GUARD = math.log(3.0)
"""A rating further than this from the latency model's is cut: far from what it was trained on a network errs without limit."""


class AwcPolicy:
    """Argmax over the catalogue. One instance serves one request; what it knows of the chain is in the observations.

    modes: it may choose from besides plain.
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
        """Return the window of the best steadied rating; plain until the first verdict has told what the chain costs."""
        if not observation.stages:
            return replace(PLAIN, reason="nothing is measured yet")
        if (running := self._trials.running(observation)) is not None:
            return running
        newest = self._network.rate(features(observation, self._current))
        steadied = newest if self._ratings is None else _SMOOTHING * newest + (1 - _SMOOTHING) * self._ratings
        self._ratings = steadied
        plain_rate = predicted_tokens_per_s(PLAIN, observation)
        rated = [
            (
                math.log(
                    corrected(decision, self._promise(steadied[index], decision, plain_rate, observation), observation)
                ),
                decision,
            )
            for index, decision in self._arms
        ]
        best_rate, best = max(rated, key=lambda pair: pair[0])
        current_rate = next((rate for rate, decision in rated if decision.kind == self._current.kind), -math.inf)
        is_first = self._ratings is newest
        if best.kind != self._current.kind and not is_first and not self._is_worth_it(best, best_rate - current_rate):
            best, best_rate = self._current, current_rate
        rates = {decision.kind: math.exp(rate) for rate, decision in rated}
        trial = self._trials.next(best, rates, observation, [decision for _, decision in self._arms])
        if trial is not None:
            self._current = trial
            return trial
        self._current = replace(
            best, reason=f"{math.exp(best_rate):.1f} tokens/s expected, plain {rates[PLAIN.kind]:.1f}"
        )
        return self._current

    def _promise(self, rating: float, decision: Decision, plain_rate: float, observation: Observation) -> float:
        if decision.mode is Mode.PLAIN:
            return plain_rate
        modelled = math.log(predicted_tokens_per_s(decision, observation) / plain_rate)
        return plain_rate * math.exp(max(modelled - _GUARD, min(modelled + _GUARD, float(rating))))

    def _is_worth_it(self, best: Decision, lead: float) -> bool:
        """True when the lead is more than noise, and another mode was wanted for long enough."""
        if best.mode is not self._wanted_mode:
            self._wanted_mode, self._num_wanted = best.mode, 0
        self._num_wanted += 1
        is_settled = best.mode is self._current.mode or self._num_wanted >= _SWITCH_AFTER
        return lead > _KEEP_MARGIN and is_settled

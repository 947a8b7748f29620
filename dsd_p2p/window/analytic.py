"""The analytic policy: picks the window with the most predicted tokens a second, corrected by measured rates.

The prediction is the latency model of docs/structures.md. It cannot know about processes that share cores, other
sessions or clustered misses, but these show in the measured rates. So the policy leaves a mode that disappoints, and
tries plain decoding where speculation leads by little. This keeps speculation from costing more than it gains.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dsd_p2p.window.base import Decision, Mode, Observation
from dsd_p2p.window.experience import TRIAL_TOKENS, Trials, kept_share, pulled
from dsd_p2p.window.static import PLAIN, SYNC_TREES, sync_chain, sync_tree, usual_tree

SYNC_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
TREES = ((1, 2), (1, 4), (2, 4), (4, 8), (12, 16))
"""(width, nodes per window) of the continuous windows considered."""

_IN_FLIGHT = (3, 6, 128)
"""Limits on windows in flight: small for stages that share a machine and slow each other down; the last is no limit."""

_KEEP_MARGIN = 1.05
"""A new decision must promise 5 % more than the current one; smaller differences are noise."""

_PASS_SPREAD = 0.04
"""How much a round's time varies from one to the next, as a share of a pass."""

_STEM_SHARE = 0.6
"""Share of its allowed stems that a continuous tree usually has in one draft step: 0.4 to 0.7 were measured."""

_MAX_AGREEMENT = 0.995
"""No drafter misses less than one token in two hundred; an agreement of 1 would promise endless runs."""

_MANY_PASSES = 20
"""In a round of more passes than this, the round's own spread is larger than a pass."""


def predicted_tokens_per_s(decision: Decision, observation: Observation) -> float:
    """Return the predicted tokens a second of `decision`.

    α is the hit rate of the first candidate, c that of all candidates together (`Observation.hit_rate_by_rank`). Plain:
    `1 / T(1)`. Synchronous chain of γ: `E[k] / (γ d + T(γ + 1))` with `E[k] = (1 - α^(γ+1)) / (1 - α)` (Leviathan et
    al. 2023, arXiv:2211.17192). For a tree, E[k] is one more than the sum of its nodes' path probabilities. Continuous:
    runs of `1 / (1 - c)` tokens; a run costs one traversal and one level time for each token after the first. A level
    takes a draft step or its share of a window at the slowest stage, whichever is longer.
    """
    if decision.mode is Mode.PLAIN:
        return 1 / observation.traversal_s(1)
    rates = observation.hit_rate_by_rank[: decision.width]
    if decision.mode is Mode.SYNC:
        return (1 + _mean_accepted(decision, rates)) / _round_s(decision, observation)
    agreement = min(sum(rates), _MAX_AGREEMENT)
    run_tokens = 1 / (1 - agreement)
    nodes_per_level = min(decision.width, decision.window_nodes)
    traversal_s = observation.traversal_s(decision.window_nodes)
    window_s = max(observation.pace_s(decision.window_nodes), traversal_s / decision.max_in_flight)
    level_s = max(_draft_step_s(decision, observation), window_s * nodes_per_level / decision.window_nodes)
    return run_tokens / (traversal_s + level_s * (run_tokens - 1))


def _mean_accepted(decision: Decision, rates: Sequence[float]) -> float:
    """Return the expected accepted drafts of a synchronous window: the sum of its nodes' path probabilities."""
    if len(rates) == 1:
        agreement = min(rates[0], _MAX_AGREEMENT)
        return agreement * (1 - agreement**decision.depth) / (1 - agreement)
    total = 0.0
    heap = [(-rate, 1) for rate in rates]
    heapq.heapify(heap)
    for _ in range(min(decision.window_nodes - 1, len(rates) * decision.depth)):
        negative, depth = heapq.heappop(heap)
        total -= negative
        if depth < decision.depth:
            for rate in rates:
                heapq.heappush(heap, (negative * rate, depth + 1))
    return total


def _round_s(decision: Decision, observation: Observation) -> float:
    """Return the seconds from one synchronous window to the next.

    A stage that several sessions keep busy begins its next pass when one ends. A window that arrives in between waits.
    So a round is a whole number of passes, and a slightly shorter window can save one.
    """
    pass_s = observation.slowest_stage_s(decision.window_nodes)
    away_s = (
        decision.depth * _draft_step_s(decision, observation) + observation.traversal_s(decision.window_nodes) - pass_s
    )
    busy_share = 1 - 1 / max(1.0, observation.num_sharing)
    if not busy_share or away_s > _MANY_PASSES * pass_s:
        return away_s + pass_s
    begun, late = divmod(away_s / pass_s, 1.0)
    # Where it is close, chance decides whether a pass is missed.
    missed = begun + _logistic(late / _PASS_SPREAD) + _logistic((late - 1) / _PASS_SPREAD)
    return (1 - busy_share) * (away_s + pass_s) + busy_share * (1 + missed) * pass_s


def _draft_step_s(decision: Decision, observation: Observation) -> float:
    """Return the seconds of one draft step over the usual number of stems."""
    share = _STEM_SHARE if decision.mode is Mode.CONTINUOUS else 1.0
    return observation.draft.at(max(1.0, share * decision.expand_nodes))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, value))))


class AnalyticPolicy:
    """A policy that takes the best of all windows it knows, plain decoding included.

    allow: the modes that it may choose besides plain.
    """

    def __init__(self, allow: frozenset[Mode] = frozenset({Mode.SYNC, Mode.CONTINUOUS})) -> None:
        self._allow = allow
        self._current: Decision | None = None
        self._trials = Trials()

    def decide(self, observation: Observation) -> Decision:
        """Return the best decision, or plain until the first verdict shows what the route costs."""
        if not observation.stages:
            return replace(PLAIN, reason="nothing measured yet")
        if (running := self._trials.running(observation)) is not None:
            return running
        # Plain comes first, so it wins ties: speculation has to earn its place.
        candidates = [PLAIN, *self._candidates(observation)]
        rates = {each.kind: _expected(each, observation) for each in candidates}
        best = max(candidates, key=lambda each: rates[each.kind])
        if self._current is not None:
            present_rate = rates.setdefault(self._current.kind, _expected(self._current, observation))
            if rates[best.kind] < _KEEP_MARGIN * present_rate:
                best = self._current
        if best is not self._current:
            reason = f"{rates[best.kind]:.1f} tokens/s expected, plain {rates[PLAIN.kind]:.1f}"
            best = replace(best, reason=reason)
        self._current = self._trials.next(best, rates, observation, candidates) or best
        return self._current

    def _candidates(self, observation: Observation) -> Iterator[Decision]:
        """Yield the windows to consider, smallest first; only small ones while little is known about the drafter."""
        is_known = observation.num_outcomes >= TRIAL_TOKENS
        if Mode.CONTINUOUS in self._allow:
            for width, window_nodes in TREES if is_known else TREES[:1]:
                for in_flight in _IN_FLIGHT if is_known else _IN_FLIGHT[:1]:
                    yield usual_tree(width, window_nodes, in_flight)
        if Mode.SYNC in self._allow:
            yield from (sync_chain(depth) for depth in (SYNC_DEPTHS if is_known else SYNC_DEPTHS[:4]))
            if is_known:
                yield from (sync_tree(nodes, depth) for nodes, depth in SYNC_TREES)


def _expected(decision: Decision, observation: Observation) -> float:
    """Return the predicted rate, corrected by how its mode kept promises and by this window's measured rate."""

    def promise(each: Decision) -> float:
        return predicted_tokens_per_s(each, observation)

    share = kept_share(decision.mode, observation, promise)
    return pulled(decision, promise(decision) * share, observation)

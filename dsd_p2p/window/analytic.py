"""Picks the window that promises the most tokens a second, corrected by what each mode was seen to achieve.

The promise is the latency model of docs/structures.md. What it cannot know (processes that share cores, other sessions, clustered
misses) shows in the measured rates, so a mode that disappoints is left, and plain decoding is tried where the lead is small: that
is what keeps speculation from ever costing more than it gains.
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
"""(width, nodes a window) of the continuous windows considered."""

_IN_FLIGHT = (3, 6, 128)
"""Most windows in flight: few for stages that slow each other down because they share a machine, or as many as the route holds."""

_KEEP_MARGIN = 1.05
"""A new decision must promise 5 % more than the present one: smaller differences are noise."""

_PASS_SPREAD = 0.04
"""Of a pass's time: how far off a round's is from one to the next."""

_STEM_SHARE = 0.6
"""Of the nodes whose children a continuous tree may draft in one step, how many it has: 0.4 to 0.7 were measured."""

_MAX_AGREEMENT = 0.995
"""Nobody guesses better than one miss in two hundred tokens; a rate of 1 would promise endless runs."""

_MANY_PASSES = 20
"""After so many a round's own spread is larger than a pass."""


def predicted_tokens_per_s(decision: Decision, observation: Observation) -> float:
    """Return the tokens a second that `decision` promises.

    With agreement α by the first candidate and coverage c by all of them (`Observation.hit_rate_by_rank`): plain `1 / T(1)`;
    synchronous chain of γ `E[k] / (γ d + T(γ + 1))`, `E[k] = (1 - α^(γ+1)) / (1 - α)` (Leviathan et al. 2023, arXiv:2211.17192), a
    tree with one more than the sum of its nodes' path probabilities for E[k]; continuous: runs of `1 / (1 - c)` tokens, one level
    time each, and one traversal per run. A level takes a draft step, or its share of a window at the slowest stage.
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
    """Drafts that a synchronous window brings through: the sum of its nodes' path probabilities, the likeliest nodes taken."""
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
    """Seconds from one synchronous window to the next.

    A stage that several sessions keep busy begins its next pass when one ends, and who comes back in between waits: the round is a
    whole number of its passes, and a window a little shorter can save one.
    """
    pass_s = observation.slowest_stage_s(decision.window_nodes)
    away_s = (
        decision.depth * _draft_step_s(decision, observation) + observation.traversal_s(decision.window_nodes) - pass_s
    )
    busy_share = 1 - 1 / max(1.0, observation.num_sharing)
    if not busy_share or away_s > _MANY_PASSES * pass_s:
        return away_s + pass_s
    begun, late = divmod(away_s / pass_s, 1.0)
    # Passes are missed by chance where it is close.
    missed = begun + _logistic(late / _PASS_SPREAD) + _logistic((late - 1) / _PASS_SPREAD)
    return (1 - busy_share) * (away_s + pass_s) + busy_share * (1 + missed) * pass_s


def _draft_step_s(decision: Decision, observation: Observation) -> float:
    """Seconds of one draft step, over as many stems as there usually are."""
    share = _STEM_SHARE if decision.mode is Mode.CONTINUOUS else 1.0
    return observation.draft.at(max(1.0, share * decision.expand_nodes))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, value))))


class AnalyticPolicy:
    """Argmax over every window this policy knows, "off" included.

    allow: the modes it may choose from besides plain.
    """

    def __init__(self, allow: frozenset[Mode] = frozenset({Mode.SYNC, Mode.CONTINUOUS})) -> None:
        self._allow = allow
        self._current: Decision | None = None
        self._trials = Trials()

    def decide(self, observation: Observation) -> Decision:
        """Return the best decision; plain until the first verdict has told what the route costs."""
        if not observation.stages:
            return replace(PLAIN, reason="nothing is measured yet")
        if (running := self._trials.running(observation)) is not None:
            return running
        # Plain comes first and so wins ties: speculation has to earn its place.
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
        """Every window considered, the smallest first; only small ones while next to nothing is known of the drafter."""
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
    """The promise, scaled by how its mode kept promises, and pulled towards what these very windows wrote lately."""

    def promise(each: Decision) -> float:
        return predicted_tokens_per_s(each, observation)

    share = kept_share(decision.mode, observation, promise)
    return pulled(decision, promise(decision) * share, observation)

"""Picks the window that promises the most tokens a second, corrected by what each mode was seen to achieve.

The promise is the latency model of docs/structures.md. What it cannot know (processes that share cores, other sessions, clustered
misses) shows in the measured rates, so a mode that disappoints is left, and plain decoding is tried where the lead is small: that
is what keeps speculation from ever costing more than it gains.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from dsd_p2p.window.base import Decision, MeasuredRate, Mode, Observation
from dsd_p2p.window.static import PLAIN, SYNC_TREES, sync_chain, sync_tree, usual_tree

SYNC_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
TREES = ((1, 2), (1, 4), (2, 4), (4, 8), (12, 16))
"""(width, nodes a window) of the continuous windows considered."""

_IN_FLIGHT = (3, 6, 128)
"""Most windows in flight: few for stages that slow each other down because they share a machine, or as many as the chain holds."""

_KEEP_MARGIN = 1.05
"""A new decision must promise 5 % more than the present one: smaller differences are noise."""

_SURE_MARGIN = 1.5
"""Where speculation leads plain by less than this, plain is measured too."""

_TRIAL_TOKENS = 6
"""Tokens a mode writes before its measured rate counts, and that a trial lasts."""

_FORGETTING = 0.99
"""What is left of the trust in a measured rate after each token that other windows wrote: texts differ."""

_FIRST_TRIAL_TOKENS = 24
"""Plain tokens after which speculation that hardly was tried is, whatever it promises, and for twice as long as otherwise."""

_PASS_SPREAD = 0.04
"""Of a pass's time: how far off a round's is from one to the next."""

_STEM_SHARE = 0.6
"""Of the nodes whose children a continuous tree may draft in one step, how many it has: 0.4 to 0.7 were measured."""

_MANY_PASSES = 20
"""After so many a round's own spread is larger than a pass."""

_DOUBT_TOKENS = 64
"""Tokens after which plain decoding is tried again where speculation falls behind what the latency model says of it."""

_FIRST_RETRY_TOKENS = 256
_MAX_RETRY_TOKENS = 4096


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
    agreement = min(sum(rates), 0.995)
    run_tokens = 1 / (1 - agreement)
    nodes_per_level = min(decision.width, decision.window_nodes)
    traversal_s = observation.traversal_s(decision.window_nodes)
    window_s = max(observation.pace_s(decision.window_nodes), traversal_s / decision.max_in_flight)
    level_s = max(_draft_step_s(decision, observation), window_s * nodes_per_level / decision.window_nodes)
    return run_tokens / (traversal_s + level_s * (run_tokens - 1))


def _mean_accepted(decision: Decision, rates: Sequence[float]) -> float:
    """Drafts that a synchronous window brings through: the sum of its nodes' path probabilities, the likeliest nodes taken."""
    if len(rates) == 1:
        agreement = min(rates[0], 0.995)
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
        """Return the best decision; plain until the first verdict has told what the chain costs."""
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
        is_known = observation.num_outcomes >= _TRIAL_TOKENS
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
            is_due = num_plain < _TRIAL_TOKENS or total > 64 * num_plain or _is_doubtful(best, observation)
            is_tried = lead < _SURE_MARGIN and is_due and total >= _TRIAL_TOKENS
            self._trial = replace(PLAIN, reason=f"trial: speculation leads by {lead:.2f} only") if is_tried else None
        is_first = best.mode is Mode.PLAIN and total - num_plain < _TRIAL_TOKENS
        self._ends_at = total + (2 * _TRIAL_TOKENS if is_first else _TRIAL_TOKENS) + 1
        return self._trial


def _retry(rates: Mapping[str, float], candidates: Sequence[Decision], num_plain: int, total: int) -> Decision | None:
    # Trials so far, each `_TRIAL_TOKENS` long: the wait doubles with every one that failed.
    num_trials = (total - num_plain) // _TRIAL_TOKENS
    wait = min(_FIRST_RETRY_TOKENS * 2 ** min(num_trials, 10), _MAX_RETRY_TOKENS)
    speculative = [each for each in candidates if each.mode is not Mode.PLAIN]
    best = max(speculative, key=lambda each: rates[each.kind], default=None)
    if best is None:
        return None
    if total - num_plain < _TRIAL_TOKENS and num_plain >= _FIRST_TRIAL_TOKENS:
        # What the first few passes and drafts were like may mislead; what was hardly tried stays unknown.
        return replace(best, reason="trial: it was hardly measured")
    is_promising = rates[best.kind] > rates[PLAIN.kind]
    return replace(best, reason="trial: it may have become faster") if num_plain >= wait and is_promising else None


def _is_doubtful(best: Decision, observation: Observation) -> bool:
    """True where it writes less than plain decoding would by the latency model, and that was not tried for long."""
    plain, measured = observation.measured.get(PLAIN.kind), observation.measured.get(best.kind)
    if plain is None or measured is None or measured.num_tokens < _TRIAL_TOKENS:
        return False
    return plain.num_tokens_since > _DOUBT_TOKENS and measured.tokens_per_s * observation.traversal_s(1) < 1


def _num_tokens(observation: Observation) -> int:
    return sum(rate.num_tokens for rate in observation.measured.values())


def trust(measured: MeasuredRate) -> float:
    """Return how much a measured rate counts against a promise, 0 to 1: more with its tokens, less with those of others since."""
    if measured.num_tokens < _TRIAL_TOKENS:
        return 0.0
    return min(1.0, measured.num_tokens / (4 * _TRIAL_TOKENS)) * _FORGETTING**measured.num_tokens_since


def kept_share(mode: Mode, observation: Observation, promise: Callable[[Decision], float]) -> float:
    """Return measured over promised speed of what the mode wrote lately; 1 where nothing is known."""
    if mode is Mode.PLAIN:
        return 1.0
    for measured in sorted(observation.measured.values(), key=lambda each: each.num_tokens_since):
        if measured.decision.mode is mode:
            ratio = measured.tokens_per_s / promise(measured.decision)
            return math.pow(max(0.3, min(1.5, ratio)), trust(measured))
    return 1.0

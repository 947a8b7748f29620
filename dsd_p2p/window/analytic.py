"""Picks the window that promises the most tokens a second under the latency model of docs/structures.md."""

import math
from collections.abc import Iterator

from dsd_p2p.window.base import Decision, Mode, Observation
from dsd_p2p.window.static import PLAIN, continuous_tree, sync_chain

SYNC_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
TREE_WIDTHS = (1, 2, 3, 4)

_KEEP_MARGIN = 1.05
"""A new decision must promise 5 % more than the present one: smaller differences are noise."""


def predicted_tokens_per_s(decision: Decision, observation: Observation) -> float:
    """Return the tokens a second that `decision` promises.

    With agreement α by the first candidate and coverage c by all of them (`Observation.hit_rate_by_rank`):
    plain `1 / T(1)`; synchronous chain of γ `E[k] / (γ d + T(γ + 1))`, `E[k] = (1 - α^(γ+1)) / (1 - α)` (Leviathan et al. 2023,
    arXiv:2211.17192); continuous: runs of `1 / (1 - c)` tokens, one level time each, and one traversal per run.
    """
    agreement = min(sum(observation.hit_rate_by_rank[: decision.width]), 0.999)
    if decision.mode is Mode.PLAIN:
        return 1 / observation.traversal_s(1)
    if decision.mode is Mode.SYNC:
        mean_committed = (1 - agreement ** (decision.depth + 1)) / (1 - agreement)
        round_s = decision.depth * observation.draft_step_s + observation.traversal_s(decision.depth + 1)
        return mean_committed / round_s
    run_tokens = 1 / (1 - agreement)
    level_s = max(observation.draft_step_s, observation.slowest_stage_s(decision.window_nodes))
    return run_tokens / (observation.traversal_s(decision.window_nodes) + level_s * (run_tokens - 1))


class AnalyticPolicy:
    """Argmax of the predicted tokens a second over every window this policy knows, "off" included.

    allow: the modes it may choose from besides plain.
    """

    def __init__(self, allow: frozenset[Mode] = frozenset({Mode.SYNC, Mode.CONTINUOUS})) -> None:
        self._allow = allow
        self._current: Decision | None = None

    def decide(self, observation: Observation) -> Decision:
        """Return the best decision; before the first verdict a short one that measures something."""
        if not observation.stages:
            return next(self._candidates(observation))
        # Plain comes first and so wins ties: speculation has to earn its place.
        candidates = [PLAIN, *self._candidates(observation)]
        rated = [(predicted_tokens_per_s(each, observation), each) for each in candidates]
        best_rate, best = max(rated, key=lambda pair: pair[0])
        if self._current is not None:
            current_rate = predicted_tokens_per_s(self._current, observation)
            if best_rate < _KEEP_MARGIN * current_rate:
                return self._current
        self._current = best
        return best

    def _candidates(self, observation: Observation) -> Iterator[Decision]:
        if Mode.CONTINUOUS in self._allow:
            for width in TREE_WIDTHS:
                window_nodes = 1 if width == 1 else 2 * width
                level_s = max(observation.draft_step_s, observation.slowest_stage_s(window_nodes), 1e-3)
                levels = math.ceil(observation.traversal_s(window_nodes) / level_s) if observation.stages else 4
                in_flight = min(max(levels + 1, 2), 64)
                yield continuous_tree(
                    depth=2 * in_flight, width=width, window_nodes=window_nodes, max_in_flight=in_flight
                )
        if Mode.SYNC in self._allow:
            yield from (sync_chain(depth) for depth in SYNC_DEPTHS)

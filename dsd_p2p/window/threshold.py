"""The threshold policy: lengthens γ while the drafter is right and shortens it while it is wrong."""

from dsd_p2p.window.base import Decision, Observation
from dsd_p2p.window.static import sync_chain


class ThresholdPolicy:
    """The baseline of arXiv:2511.21669: γ grows by one token at agreement above `high` and shrinks by one below `low`.

    It steps by whole tokens, because scaling by a factor gets stuck where rounding undoes it.
    """

    def __init__(self, low: float = 0.6, high: float = 0.8, first_depth: int = 4, max_depth: int = 12) -> None:
        self._low, self._high, self._max_depth = low, high, max_depth
        self._depth = first_depth
        self._num_outcomes = 0

    def decide(self, observation: Observation) -> Decision:
        """Return a synchronous chain."""
        is_news = observation.num_outcomes > self._num_outcomes
        if is_news and observation.hit_rate_by_rank:
            self._num_outcomes = observation.num_outcomes
            agreement = observation.hit_rate_by_rank[0]
            step = (agreement > self._high) - (agreement < self._low)
            self._depth = max(1, min(self._max_depth, self._depth + step))
        return sync_chain(self._depth)

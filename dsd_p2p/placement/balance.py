"""Chooses among several targets for a request by their load."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dsd_p2p.types import UniformRng


class Routing(StrEnum):
    """The rule by which a target is chosen."""

    RANDOM = "random"
    ROUND_ROBIN = "round-robin"
    SHORTEST_QUEUE = "jsq"
    TWO_CHOICES = "power-of-two"
    """The shorter of two random queues (Mitzenmacher 2001)."""

    PREDICTED = "predicted-time"


@dataclass(frozen=True, slots=True)
class Load:
    """A target's load as the balancer sees it.

    num_queued: requests that it serves or that wait there. window_s: its time per window. link_s: round trip to it.
    """

    num_queued: int
    window_s: float = 0.0
    link_s: float = 0.0

    @property
    def predicted_s(self) -> float:
        """Seconds from sending a window now to its answer."""
        return self.link_s + (self.num_queued + 1) * self.window_s


class Balancer:
    """A chooser of targets, which remembers whose turn it is."""

    def __init__(self, routing: Routing, rng: UniformRng) -> None:
        self._routing = routing
        self._rng = rng
        self._turn = -1

    def choose(self, loads: Sequence[Load]) -> int:
        """Return the index of the chosen target. loads: one per target, at least one."""
        count = len(loads)
        match self._routing:
            case Routing.RANDOM:
                return self._random(count)
            case Routing.ROUND_ROBIN:
                self._turn = (self._turn + 1) % count
                return self._turn
            case Routing.TWO_CHOICES:
                first, second = self._random(count), self._random(count)
                return min(first, second, key=lambda index: (loads[index].num_queued, index))
            case Routing.SHORTEST_QUEUE:
                return self._least([load.num_queued for load in loads])
            case Routing.PREDICTED:
                return self._least([load.predicted_s for load in loads])

    def _least(self, costs: Sequence[float]) -> int:
        """Return the index of the least cost; ties are broken at random, so that not all requests go to the first."""
        least = min(costs)
        best = [index for index, cost in enumerate(costs) if cost == least]
        return best[self._random(len(best))]

    def _random(self, count: int) -> int:
        return min(int(self._rng.random() * count), count - 1)

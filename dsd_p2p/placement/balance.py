"""Which of several targets takes a request, by what is known of their load."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dsd_p2p.types import UniformRng


class Routing(StrEnum):
    """How a target is chosen."""

    RANDOM = "random"
    ROUND_ROBIN = "round-robin"
    SHORTEST_QUEUE = "jsq"
    TWO_CHOICES = "power-of-two"
    """The shorter queue of two random ones (Mitzenmacher 2001)."""

    PREDICTED = "predicted-time"


@dataclass(frozen=True, slots=True)
class Load:
    """A target as the router sees it.

    num_queued: requests it serves or keeps waiting. window_s: what one window costs it. link_s: round trip.
    """

    num_queued: int
    window_s: float = 0.0
    link_s: float = 0.0

    @property
    def predicted_s(self) -> float:
        """Seconds until a window sent now is answered."""
        return self.link_s + (self.num_queued + 1) * self.window_s


class Balancer:
    """Chooses; remembers whose turn it is."""

    def __init__(self, routing: Routing, rng: UniformRng) -> None:
        self._routing = routing
        self._rng = rng
        self._turn = -1

    def choose(self, loads: Sequence[Load]) -> int:
        """Return the index of the chosen one of `loads`, which are not empty."""
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
        """The index of the least; of several a random one, so that not all go to the first."""
        least = min(costs)
        best = [index for index, cost in enumerate(costs) if cost == least]
        return best[self._random(len(best))]

    def _random(self, count: int) -> int:
        return min(int(self._rng.random() * count), count - 1)

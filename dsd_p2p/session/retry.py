"""Says how often, and after what delay, a request tries again after losing its route."""

from dataclasses import dataclass

from dsd_p2p.types import UniformRng


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Bounded exponential backoff with full jitter.

    max_attempts: most replays of one request without a committed token in between.
    """

    max_attempts: int = 3
    first_delay_s: float = 0.25
    max_delay_s: float = 4.0

    def delay_s(self, attempt: int, rng: UniformRng) -> float:
        """Return the seconds to wait before attempt number `attempt`, counted from 0."""
        return rng.random() * min(self.max_delay_s, self.first_delay_s * 2.0**attempt)

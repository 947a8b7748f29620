"""What a link does to a frame; shared by the emulated transport and the simulator."""

from dataclasses import dataclass
from typing import Protocol


class UniformRng(Protocol):
    """The part of `random.Random` that a link needs."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """One direction of a link.

    latency_s: one-way propagation delay, seconds.
    jitter_s: half width of a uniform deviation around it, seconds. Frames never overtake each other.
    bandwidth_bps: bits a second; 0 is unlimited.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth_bps: float = 0.0

    @property
    def is_ideal(self) -> bool:
        """True when a frame passes untouched."""
        return self.latency_s == 0 and self.jitter_s == 0 and self.bandwidth_bps == 0


class LinkState:
    """A link in use: when its sender is free again and when its last frame arrives."""

    def __init__(self, model: LinkModel) -> None:
        self.model = model
        self._sender_free_at_s = 0.0
        self._last_arrival_s = 0.0

    def send(self, *, now_s: float, num_bytes: int, rng: UniformRng) -> float:
        """Put a frame of `num_bytes` on the link at `now_s`; return the time its last byte arrives."""
        model = self.model
        start_s = max(now_s, self._sender_free_at_s)
        transmit_s = num_bytes * 8 / model.bandwidth_bps if model.bandwidth_bps else 0.0
        self._sender_free_at_s = start_s + transmit_s
        deviation_s = (2 * rng.random() - 1) * model.jitter_s if model.jitter_s else 0.0
        arrival_s = self._sender_free_at_s + max(0.0, model.latency_s + deviation_s)
        self._last_arrival_s = max(self._last_arrival_s, arrival_s)
        return self._last_arrival_s

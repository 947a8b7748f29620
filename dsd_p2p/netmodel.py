"""Models what a link does to a frame, for the emulated transport and the simulator."""

import math
from dataclasses import dataclass

from dsd_p2p.types import UniformRng

_SEGMENT_BYTES = 1460
_MIN_RETRANSMIT_S = 0.2
"""Linux's minimum retransmission timeout. Few windows are long enough for TCP to notice a loss sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """One direction of a link.

    latency_s: one-way propagation delay, seconds.
    jitter_s: half-width of a uniform deviation around the latency, seconds. Frames never overtake each other.
    bandwidth_bps: bits per second; 0 is unlimited.
    loss: share of the segments that are lost. They are sent again one retransmission timeout later.
    stall_every_s: mean time between stalls, seconds; nothing leaves during a stall. 0: no stalls.
    stall_s: duration of a stall, seconds; 0: no stalls.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth_bps: float = 0.0
    loss: float = 0.0
    stall_every_s: float = 0.0
    stall_s: float = 0.0

    @property
    def is_ideal(self) -> bool:
        """True if frames pass without delay, loss or limit."""
        return self.latency_s == 0 and self.is_constant and self.bandwidth_bps == 0

    @property
    def is_constant(self) -> bool:
        """True if nothing about the link is random."""
        return self.jitter_s == 0 and self.loss == 0 and (self.stall_every_s == 0 or self.stall_s == 0)


def in_series(first: LinkModel, second: LinkModel) -> LinkModel:
    """Return one link that stands for two in series.

    It has the lower bandwidth, and the stalls of the link that stalls more often.
    """
    bandwidths = [model.bandwidth_bps for model in (first, second) if model.bandwidth_bps]
    stalling = [model for model in (first, second) if model.stall_every_s and model.stall_s]
    stalls = min(stalling, key=lambda model: model.stall_every_s, default=first)
    return LinkModel(
        latency_s=first.latency_s + second.latency_s,
        jitter_s=first.jitter_s + second.jitter_s,
        bandwidth_bps=min(bandwidths, default=0.0),
        loss=1 - (1 - first.loss) * (1 - second.loss),
        stall_every_s=stalls.stall_every_s,
        stall_s=stalls.stall_s,
    )


class LinkState:
    """The state of a link in use: when its sender is free again, and when its last frame arrives."""

    def __init__(self, model: LinkModel) -> None:
        self.model = model
        self._sender_free_at_s = 0.0
        self._last_arrival_s = 0.0
        self._next_stall_s: float | None = None

    def send(self, *, now_s: float, num_bytes: int, rng: UniformRng) -> float:
        """Put a frame of `num_bytes` on the link at `now_s`; return the time at which its last byte arrives."""
        model = self.model
        start_s = max(now_s, self._sender_free_at_s)
        if model.stall_every_s and model.stall_s:
            start_s = self._after_stalls(start_s, rng)
        transmit_s = num_bytes * 8 / model.bandwidth_bps if model.bandwidth_bps else 0.0
        self._sender_free_at_s = start_s + transmit_s
        deviation_s = (2 * rng.random() - 1) * model.jitter_s if model.jitter_s else 0.0
        arrival_s = self._sender_free_at_s + max(0.0, model.latency_s + deviation_s)
        if model.loss and rng.random() < 1 - (1 - model.loss) ** math.ceil(num_bytes / _SEGMENT_BYTES):
            arrival_s += max(_MIN_RETRANSMIT_S, 3 * model.latency_s)
        self._last_arrival_s = max(self._last_arrival_s, arrival_s)
        return self._last_arrival_s

    def _after_stalls(self, at_s: float, rng: UniformRng) -> float:
        """Return when a frame that is ready at `at_s` may leave."""
        model = self.model
        if self._next_stall_s is None:
            self._next_stall_s = _exponential(model.stall_every_s, rng)
        while self._next_stall_s + model.stall_s <= at_s:
            self._next_stall_s += model.stall_s + _exponential(model.stall_every_s, rng)
        return at_s if at_s < self._next_stall_s else self._next_stall_s + model.stall_s


def _exponential(mean: float, rng: UniformRng) -> float:
    return -mean * math.log(1 - rng.random())

"""How long things take: measured curves, service times that vary, and machines whose cores several processes share."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from dsd_p2p.netmodel import UniformRng
from dsd_p2p.sim.clock import Clock


class Spread(StrEnum):
    """How service times scatter around their mean."""

    NONE = "none"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """Seconds of one pass over n positions of `num_windows` windows.

    nodes, seconds: measured points, nodes ascending; linear between them and past the last with its slope.
    per_window_s: for each window of a batch after the first.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    per_window_s: float = 0.0

    @classmethod
    def line(cls, fixed_s: float, per_node_s: float, per_window_s: float = 0.0) -> "PassCost":
        """Return `fixed_s + per_node_s * n`."""
        return cls(nodes=(0, 1), seconds=(fixed_s, fixed_s + per_node_s), per_window_s=per_window_s)

    def scaled(self, factor: float) -> "PassCost":
        """Return the same machine with `factor` times the work."""
        return PassCost(
            nodes=self.nodes,
            seconds=tuple(value * factor for value in self.seconds),
            per_window_s=self.per_window_s * factor,
        )

    def at(self, num_nodes: int, num_windows: int = 1) -> float:
        """Seconds of the pass."""
        nodes, seconds = self.nodes, self.seconds
        more_s = self.per_window_s * (num_windows - 1)
        if len(nodes) == 1:
            return seconds[0] + more_s
        upper = min(max(bisect.bisect_left(nodes, num_nodes), 1), len(nodes) - 1)
        (n0, n1), (s0, s1) = nodes[upper - 1 : upper + 1], seconds[upper - 1 : upper + 1]
        return max(0.0, s0 + (s1 - s0) * (num_nodes - n0) / (n1 - n0)) + more_s


def spread(seconds: float, kind: Spread, rng: UniformRng) -> float:
    """Return one service time of that mean."""
    return seconds if kind is Spread.NONE else -seconds * math.log(1 - rng.random())


class Processor(Protocol):
    """What work is done on."""

    def run(self, seconds: float, done: Callable[..., object], *arguments: Any) -> None:
        """Call `done` when work of `seconds` on an otherwise idle machine is finished."""
        ...


class Dedicated:
    """A machine that nobody else uses."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def run(self, seconds: float, done: Callable[..., object], *arguments: Any) -> None:
        """Call `done` after `seconds`."""
        self._clock.after(seconds, done, *arguments)


class SharedCores:
    """Cores that serve all jobs alike (processor sharing): n jobs on c cores each get min(1, c / n) of one."""

    def __init__(self, clock: Clock, num_cores: float) -> None:
        self._clock = clock
        self._num_cores = num_cores
        self._jobs: list[list[Any]] = []
        self._updated_s = 0.0
        self._version = 0

    def run(self, seconds: float, done: Callable[..., object], *arguments: Any) -> None:
        """Call `done` when the job has had `seconds` of a core."""
        self._advance()
        self._jobs.append([seconds, done, arguments])
        self._schedule()

    def _advance(self) -> None:
        now_s = self._clock.now_s
        worked_s = (now_s - self._updated_s) * self._share()
        self._updated_s = now_s
        for job in self._jobs:
            job[0] -= worked_s

    def _share(self) -> float:
        return min(1.0, self._num_cores / len(self._jobs)) if self._jobs else 1.0

    def _schedule(self) -> None:
        self._version += 1
        if self._jobs:
            left_s = min(job[0] for job in self._jobs)
            self._clock.after(max(0.0, left_s) / self._share(), self._finish, self._version)

    def _finish(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        finished = [job for job in self._jobs if job[0] <= 1e-12]
        self._jobs = [job for job in self._jobs if job[0] > 1e-12]
        self._schedule()
        for _, done, arguments in finished:
            done(*arguments)


def fit_line(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the least-squares `(fixed, slope)` of (n, seconds), neither of them negative."""
    count = len(samples)
    mean_n, mean_s = sum(n for n, _ in samples) / count, sum(s for _, s in samples) / count
    variance = sum((n - mean_n) ** 2 for n, _ in samples)
    slope = sum((n - mean_n) * (s - mean_s) for n, s in samples) / variance if variance > 1e-12 else 0.0
    slope = max(0.0, slope)
    return max(0.0, mean_s - slope * mean_n), slope

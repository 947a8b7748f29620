"""Models how long work takes: measured curves, service times that vary, and cores that several processes share."""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from dsd_p2p.sim.clock import Clock
from dsd_p2p.types import UniformRng

_NOTHING_S = 1e-9
"""Less remaining work than this counts as done: far into a run the clock is no finer."""


class Spread(StrEnum):
    """How service times scatter around their mean."""

    NONE = "none"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """The seconds that a pass takes over n positions of one or several windows.

    nodes, seconds: measured points, nodes ascending. Linear between the points, and beyond them.
    per_window_s: added for each window of a batch after the first.
    per_context_s: added by attention for each position of the text before a window.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    per_window_s: float = 0.0
    per_context_s: float = 0.0

    @classmethod
    def line(
        cls, fixed_s: float, per_node_s: float, per_window_s: float = 0.0, per_context_s: float = 0.0
    ) -> "PassCost":
        """Return the cost `fixed_s + per_node_s * n`."""
        return cls(
            nodes=(0, 1),
            seconds=(fixed_s, fixed_s + per_node_s),
            per_window_s=per_window_s,
            per_context_s=per_context_s,
        )

    def scaled(self, factor: float) -> "PassCost":
        """Return the cost of `factor` times the work on the same machine."""
        return PassCost(
            nodes=self.nodes,
            seconds=tuple(value * factor for value in self.seconds),
            per_window_s=self.per_window_s * factor,
            per_context_s=self.per_context_s * factor,
        )

    def at(self, num_nodes: int, num_windows: int = 1, context: int = 0) -> float:
        """Return the seconds of one pass. context: positions before the windows, added up over all windows."""
        nodes, seconds = self.nodes, self.seconds
        more_s = self.per_window_s * (num_windows - 1) + self.per_context_s * context
        if len(nodes) == 1:
            return seconds[0] + more_s
        upper = min(max(bisect.bisect_left(nodes, num_nodes), 1), len(nodes) - 1)
        (n0, n1), (s0, s1) = nodes[upper - 1 : upper + 1], seconds[upper - 1 : upper + 1]
        return max(0.0, s0 + (s1 - s0) * (num_nodes - n0) / (n1 - n0)) + more_s


def spread(seconds: float, kind: Spread, rng: UniformRng) -> float:
    """Return one service time whose mean is `seconds`."""
    return seconds if kind is Spread.NONE else -seconds * math.log(1 - rng.random())


class Processor(Protocol):
    """A machine, or a share of one, that does work."""

    def run(self, seconds: float, done: Callable[..., object], *arguments: Any) -> None:
        """Call `done` when work of `seconds` on an otherwise idle machine is finished."""
        ...


class Dedicated:
    """A machine that is not shared."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def run(self, seconds: float, done: Callable[..., object], *arguments: Any) -> None:
        """Call `done` after `seconds`."""
        self._clock.after(seconds, done, *arguments)


class SharedCores:
    """Cores that serve several jobs at once (processor sharing). A job's share goes by its weight, up to one core."""

    def __init__(self, clock: Clock, num_cores: float) -> None:
        self._clock = clock
        self._num_cores = num_cores
        self._jobs: list[_Job] = []
        self._updated_s = 0.0
        self._version = 0

    def user(self, weight: float = 1.0) -> "Processor":
        """Return a processor on these cores whose jobs have this weight."""
        return _User(self, weight)

    def run(self, seconds: float, weight: float, done: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        """Call `done` when the job has had `seconds` of a core."""
        self._advance()
        self._jobs.append(_Job(seconds, weight, done, arguments))
        self._schedule()

    def _advance(self) -> None:
        passed_s = self._clock.now_s - self._updated_s
        self._updated_s += passed_s
        for job in self._jobs:
            job.left_s -= passed_s * job.rate

    def _schedule(self) -> None:
        self._version += 1
        if not self._jobs:
            return
        self._divide()
        next_s = min(job.left_s / job.rate for job in self._jobs)
        self._clock.after(max(0.0, next_s), self._finish, self._version)

    def _divide(self) -> None:
        """Give each job its share. A job gets at most one core; the rest of a larger share goes to the other jobs."""
        cores, waiting = self._num_cores, self._jobs
        while waiting:
            total = sum(job.weight for job in waiting)
            full = [job for job in waiting if cores * job.weight >= total]
            if not full:
                for job in waiting:
                    job.rate = cores * job.weight / total
                return
            for job in full:
                job.rate = 1.0
            cores -= len(full)
            waiting = [job for job in waiting if cores > 0 and job not in full]

    def _finish(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        finished = [job for job in self._jobs if job.left_s <= _NOTHING_S]
        self._jobs = [job for job in self._jobs if job.left_s > _NOTHING_S]
        self._schedule()
        for job in finished:
            job.done(*job.arguments)


@dataclass(slots=True, eq=False)
class _Job:
    left_s: float
    weight: float
    done: Callable[..., object]
    arguments: tuple[Any, ...]
    rate: float = 1.0


class _User:
    def __init__(self, cores: SharedCores, weight: float) -> None:
        self._cores, self._weight = cores, weight

    def run(self, seconds: float, done: Callable[..., object], *arguments: Any) -> None:
        self._cores.run(seconds, self._weight, done, arguments)

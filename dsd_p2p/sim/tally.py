"""Counts a run's requests, and keeps their logs and the run's timeline."""

from collections.abc import Callable

from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.machines import PassLog
from dsd_p2p.sim.request import RequestLog
from dsd_p2p.sim.target import Flight

_PROGRESS_EVERY = 1000


class Tally:
    """The counts of a run's requests: started, ended and under way.

    progress: called with the number of ended requests and the time, after each thousand that end.
    has_more: the workload has requests that have not arrived yet.
    under_way_s: integral of the requests under way over time, in requests times seconds.
    """

    def __init__(self, clock: Clock, progress: Callable[[int, float], None] | None) -> None:
        self._clock = clock
        self._progress = progress
        self.has_more = True
        self.num_started = 0
        self._num_ended = 0
        self.under_way_s = 0.0
        self._changed_s = 0.0
        self._ended_s = 0.0
        self.logs: list[RequestLog] = []

    @property
    def num_under_way(self) -> int:
        """Requests that have not ended."""
        return self.num_started - self._num_ended

    @property
    def is_over(self) -> bool:
        """True if all requests have arrived and ended."""
        return not self.has_more and not self.num_under_way

    @property
    def duration_s(self) -> float:
        """Seconds until the last request ended, or until the run did."""
        return max(self._ended_s, 1e-12)

    def started(self) -> int:
        """Count a request that starts, and return its number."""
        self._count()
        self.num_started += 1
        return self.num_started - 1

    def ended(self, log: RequestLog) -> None:
        """Count a request that ended."""
        self._count()
        self._num_ended += 1
        self._ended_s = self._clock.now_s
        self.logs.append(log)
        if self._progress is not None and self._num_ended % _PROGRESS_EVERY == 0:
            self._progress(self._num_ended, self._clock.now_s)

    def close(self) -> None:
        """Close the count, including the requests that are still under way."""
        if self.num_under_way:
            self._ended_s = self._clock.now_s
            self._count()

    def _count(self) -> None:
        now_s = self._clock.now_s
        self.under_way_s += self.num_under_way * (now_s - self._changed_s)
        self._changed_s = now_s


class Timeline:
    """Every request's arrivals and every pass of a run, if they are recorded.

    Passes are (target, stage, start, end, windows, nodes).
    """

    def __init__(self, *, is_recording: bool) -> None:
        self._is_recording = is_recording
        self.passes: list[tuple[str, int, float, float, int, int]] = []

    @property
    def pass_log(self) -> PassLog | None:
        """The function that stages call after each pass; None if nothing is recorded."""
        return self._record if self._is_recording else None

    def new_arrivals(self) -> list[tuple[float, int]] | None:
        """Return a list for a request's arrivals; None if nothing is recorded."""
        return [] if self._is_recording else None

    def _record(self, unit: str, stage: int, start_s: float, end_s: float, batch: list[Flight]) -> None:
        num_nodes = sum(len(flight.window.tokens) for flight in batch)
        self.passes.append((unit, stage, start_s, end_s, len(batch), num_nodes))

"""Keeps virtual time: SimPy's event queue with callbacks, which cost a third of what SimPy's processes cost."""

from collections.abc import Callable
from typing import Any

import simpy
from simpy.events import NORMAL, Event

_LAST = NORMAL + 1


class _Call(Event):  # type: ignore[misc]
    """An event that calls a function when its time comes."""

    def __init__(
        self,
        env: simpy.Environment,
        delay_s: float,
        priority: int,
        action: Callable[..., object],
        arguments: tuple[Any, ...],
    ) -> None:
        # As in simpy.Timeout, but without its value and its argument checks.
        self.env = env
        self.callbacks = [self._run]
        self._value = None
        self._ok = True
        self._defused = False
        self._action, self._arguments = action, arguments
        env.schedule(self, priority, delay_s)

    def _run(self, _event: Event) -> None:
        self._action(*self._arguments)


class Clock:
    """A virtual clock that calls functions later.

    Events of one moment happen in the order in which they were scheduled, but deadlines come after all other events.
    """

    def __init__(self) -> None:
        self._env = simpy.Environment()

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return float(self._env.now)

    def after(self, delay_s: float, action: Callable[..., object], *arguments: Any) -> None:
        """Call `action` with `arguments` in `delay_s` seconds, 0 or more."""
        self._schedule(delay_s, NORMAL, action, arguments)

    def deadline(self, delay_s: float, action: Callable[..., object], *arguments: Any) -> None:
        """Call `action` likewise, but after all other events of that moment."""
        self._schedule(delay_s, _LAST, action, arguments)

    def _schedule(
        self, delay_s: float, priority: int, action: Callable[..., object], arguments: tuple[Any, ...]
    ) -> None:
        if not delay_s >= 0:
            raise ValueError(f"delay_s is {delay_s}, expected 0 or more")
        _Call(self._env, delay_s, priority, action, arguments)

    def run(self, until_s: float) -> None:
        """Run events until none is left or the time is `until_s`."""
        env = self._env
        while env.peek() <= until_s:
            env.step()

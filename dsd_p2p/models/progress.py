"""Defines the interface through which long steps report their progress."""

from typing import Protocol


class Progress(Protocol):
    """A display for one long step after another."""

    def step(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `what` are finished; `total` is 0 if unknown."""
        ...


class NoProgress:
    """A display that shows nothing."""

    def step(self, what: str, done: int, total: int) -> None:
        """Do nothing."""

"""How long steps tell how far they are, without knowing who shows it."""

from typing import Protocol


class Progress(Protocol):
    """Shows one long step after another."""

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of `what` are finished; `total` 0 when it is not known."""
        ...


class NoProgress:
    """Shows nothing."""

    def step(self, what: str, done: int, total: int) -> None:
        """Ignore it."""

"""Matches pongs to the pings that wait for them."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Pings:
    """The pings under way."""

    def __init__(self) -> None:
        self._answered: dict[int, trio.Event] = {}
        self._next_nonce = 0

    @contextmanager
    def ping(self) -> Iterator[tuple[int, trio.Event]]:
        """Yield a fresh nonce, and the event of its answer."""
        self._next_nonce += 1
        nonce = self._next_nonce
        self._answered[nonce] = trio.Event()
        try:
            yield nonce, self._answered[nonce]
        finally:
            del self._answered[nonce]

    def answered(self, nonce: int) -> None:
        """Note an answer; one that nobody waits for is dropped."""
        if nonce in self._answered:
            self._answered[nonce].set()

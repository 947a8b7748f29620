"""Runs what a peer is told beside the receive loop, so that a peer that reads nothing holds up nobody."""

from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from dsd_p2p.types import PeerId

_MAX_ANSWERS = 8

Task = Callable[[], Awaitable[None]]


class Aside:
    """Answers and goodbyes. Before `start` they run at once."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._answering: Counter[PeerId] = Counter()
        self._leaving: set[PeerId] = set()

    def start(self, nursery: trio.Nursery) -> None:
        """Run tasks in `nursery` from now on."""
        self._nursery = nursery

    async def answer(self, peer: PeerId, task: Task) -> None:
        """Run an answer to a peer. One with many answers on their way gets no more for now."""
        if self._nursery is None:
            await task()
        elif self._answering[peer] < _MAX_ANSWERS:
            self._answering[peer] += 1
            self._nursery.start_soon(self._counted, peer, task)

    async def _counted(self, peer: PeerId, task: Task) -> None:
        try:
            await task()
        finally:
            self._answering[peer] -= 1
            if not self._answering[peer]:
                del self._answering[peer]

    async def dismiss(self, peer: PeerId, task: Task) -> None:
        """Run what drops a peer. Nothing that it still sends is to be read."""
        if peer in self._leaving:
            return
        self._leaving.add(peer)
        if self._nursery is None:
            await task()
        else:
            self._nursery.start_soon(task)

    def is_leaving(self, peer: PeerId) -> bool:
        """Return whether a peer is being dropped."""
        return peer in self._leaving

    def forget(self, peer: PeerId) -> None:
        """Note that the connection to a peer is gone; it may come back."""
        self._leaving.discard(peer)

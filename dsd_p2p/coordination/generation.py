"""Gives the caller of `Engine.generate` access to its running request."""

from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import trio

from dsd_p2p.coordination.driver import RequestDriver
from dsd_p2p.errors import LocalProtocolError
from dsd_p2p.session.effects import Emit, Finish
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import RequestStats
from dsd_p2p.session.timing import Timing
from dsd_p2p.types import TokenId
from dsd_p2p.window.base import Decision


@dataclass(slots=True, kw_only=True)
class Generation:
    """A running request. Iterate over it or over `pieces()` for its tokens, then read its other fields."""

    batches: trio.MemoryReceiveChannel[Emit]
    stats: RequestStats
    machine: RequestMachine
    driver: RequestDriver
    timing: Timing
    waiting: deque[TokenId] = field(default_factory=deque)

    async def pieces(self) -> AsyncGenerator[Emit, None]:
        """Yield the tokens as they arrive, those of one verdict together.

        Raises:
            DsdError: the request failed; all tokens yielded before remain valid.
        """
        while (piece := await self._next_piece()) is not None:
            yield piece

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> TokenId:
        """Return the next committed token; raises as `pieces` does."""
        while not self.waiting:
            piece = await self._next_piece()
            if piece is None:
                raise StopAsyncIteration
            self.waiting.extend(piece.tokens)
        return self.waiting.popleft()

    async def _next_piece(self) -> Emit | None:
        try:
            piece = await self.batches.receive()
        except trio.EndOfChannel:
            if self.finish is None:
                raise LocalProtocolError("the request ended without saying why: please report it") from None
            if self.finish.error is not None:
                raise self.finish.error from None
            return None
        self.timing.arrived(len(piece.tokens), trio.current_time())
        return piece

    @property
    def finish(self) -> Finish | None:
        """How the request ended; None while it is running."""
        return self.driver.finish

    @property
    def decision(self) -> Decision:
        """The window policy's present decision."""
        return self.machine.decision

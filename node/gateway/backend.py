"""Defines how the gateway gets answers from its swarm."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import trio

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.coordination.for_others import ThinClient
from dsd_p2p.coordination.statistics import AnswerStatistics, statistics_of
from dsd_p2p.errors import CapacityError, ConfigError, PeerDisconnected
from dsd_p2p.session.effects import Emit
from dsd_p2p.session.timing import Timing
from dsd_p2p.types import PeerId, TokenId
from dsd_p2p.window.base import WindowPolicy


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How an answer was made. The backend fills it in while it writes.

    num_cached_tokens: prompt tokens whose cache the stages still held. statistics: None before the first token.
    """

    num_cached_tokens: int = 0
    statistics: AnswerStatistics | None = None


class Backend(Protocol):
    """A way into a swarm."""

    def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece. Closing the generator frees the stages.

        Raises:
            DsdError: the reason why the answer ended early.
        """
        ...


class EngineBackend:
    """A backend that coordinates in this process.

    make_policy: returns a window policy for one request.
    """

    def __init__(self, engine: Engine, make_policy: Callable[[], WindowPolicy]) -> None:
        self._engine = engine
        self._make_policy = make_policy

    async def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece. Raises the same errors as `Backend.write`."""
        policy = self._engine.governed(self._make_policy())
        is_running = False
        try:
            async with self._engine.generate(prompt, options, policy) as generation:
                is_running = True
                try:
                    async with aclosing(generation.pieces()) as pieces:
                        async for piece in pieces:
                            yield piece
                finally:
                    outcome.num_cached_tokens = generation.stats.num_prefix_tokens
                    if generation.timing.num_tokens:
                        outcome.statistics = statistics_of(generation)
        except ConfigError as exc:
            if is_running:
                # A stage refuses what only shows there, such as a constraint with which no token goes on.
                raise
            # The request has been checked by now: the swarm is what cannot serve it.
            raise PeerDisconnected(str(exc)) from exc


class SwarmBackend:
    """A backend that lets the best coordinator write, whether this peer or another.

    choose: returns the peer that should coordinate now, or None for this one.
    """

    def __init__(
        self, here: EngineBackend | None, thin: ThinClient, choose: Callable[[], PeerId | None], deadline_s: float
    ) -> None:
        self._here = here
        self._thin = thin
        self._choose = choose
        self._deadline_s = deadline_s

    async def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece. Raises the same errors as `Backend.write`."""
        coordinator = None if options.audit else self._choose()
        if options.audit and self._here is None:
            raise CapacityError("this gateway coordinates nothing itself, so it cannot audit: start it with a drafter")
        if coordinator is None and self._here is not None:
            async with aclosing(self._here.write(prompt, options, outcome)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        timing = Timing(started_at_s=trio.current_time())
        async with aclosing(self._thin.generate(prompt, options, self._deadline_s)) as pieces:
            async for piece in pieces:
                timing.arrived(len(piece.tokens), trio.current_time())
                # Only timing can be seen from here; the coordinator keeps the details.
                outcome.statistics = AnswerStatistics(timing=timing, coordinator=coordinator or PeerId(""))
                yield piece

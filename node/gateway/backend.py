"""What the gateway asks of the swarm behind it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import trio

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.coordination.for_others import ThinClient
from dsd_p2p.coordination.statistics import AnswerStatistics, statistics_of
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.errors import ConfigError, PeerDisconnected
from dsd_p2p.session.effects import Emit
from dsd_p2p.session.timing import Timing
from dsd_p2p.types import PeerId, TokenId
from dsd_p2p.window.base import WindowPolicy


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How an answer came about, filled in as it is written.

    num_cached_tokens: of the prompt, that the stages still held. statistics: None before the first token.
    """

    num_cached_tokens: int = 0
    statistics: AnswerStatistics | None = None


class Backend(Protocol):
    """A way into a swarm."""

    def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece; closing the generator frees the stages.

        Raises:
            DsdError: what ended it.
        """
        ...


class EngineBackend:
    """This process coordinates. make_policy: a window policy for one request."""

    def __init__(self, engine: Engine, drafter: Drafter, make_policy: Callable[[], WindowPolicy]) -> None:
        self._engine = engine
        self._drafter = drafter
        self._make_policy = make_policy

    async def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece. Raises as `Backend.write` does."""
        policy = self._engine.governed(self._make_policy())
        try:
            async with self._engine.generate(prompt, options, policy) as generation:
                try:
                    async with aclosing(generation.pieces()) as pieces:
                        async for piece in pieces:
                            yield piece
                finally:
                    outcome.num_cached_tokens = generation.stats.num_prefix_tokens
                    if generation.timing.num_tokens:
                        outcome.statistics = statistics_of(generation, self._drafter.name)
        except ConfigError as exc:
            # What was asked is checked by now: it is the swarm that cannot.
            raise PeerDisconnected(str(exc)) from exc


class SwarmBackend:
    """The best coordinator writes, be it this node or another.

    choose: the peer that should coordinate now; None for this node.
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
        """Yield an answer piece by piece. Raises as `Backend.write` does."""
        coordinator = self._choose()
        if coordinator is None and self._here is not None:
            async with aclosing(self._here.write(prompt, options, outcome)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        timing = Timing(started_at_s=trio.current_time())
        async with aclosing(self._thin.generate(prompt, options, self._deadline_s)) as pieces:
            async for piece in pieces:
                timing.arrived(len(piece.tokens), trio.current_time())
                # What can be seen from here; the details are the coordinator's.
                outcome.statistics = AnswerStatistics(timing=timing, coordinator=coordinator or PeerId(""))
                yield piece

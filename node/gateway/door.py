"""What the gateway asks of the swarm behind it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import trio

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.coordination.for_others import ThinClient
from dsd_p2p.coordination.statistics import summarise
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.errors import ConfigError, PeerDisconnected
from dsd_p2p.session.effects import Emit
from dsd_p2p.types import PeerId, TokenId
from dsd_p2p.window.base import WindowPolicy


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How an answer came about, filled in as it ends.

    coordinator: whoever wrote it for us; empty is this node. num_cached_tokens: of the prompt, that the stages still held.
    """

    coordinator: str = ""
    num_cached_tokens: int = 0
    statistics: dict[str, object] = field(default_factory=dict)


class Door(Protocol):
    """A way into a swarm."""

    def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece; closing the generator frees the stages.

        Raises:
            DsdError: what ended it.
        """
        ...


class EngineDoor:
    """This process coordinates. make_policy: a window policy for one request."""

    def __init__(self, engine: Engine, drafter: Drafter, make_policy: Callable[[], WindowPolicy]) -> None:
        self._engine = engine
        self._drafter = drafter
        self._make_policy = make_policy

    async def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece. Raises as `Door.write` does."""
        policy = self._engine.governed(self._make_policy())
        try:
            async with self._engine.generate(prompt, options, policy) as generation:
                num_tokens = 0
                try:
                    async with aclosing(generation.pieces()) as pieces:
                        async for piece in pieces:
                            num_tokens += len(piece.tokens)
                            yield piece
                finally:
                    outcome.num_cached_tokens = generation.stats.num_prefix_tokens
                    if num_tokens:
                        outcome.statistics = summarise(generation, self._drafter.name, len(prompt), num_tokens)
        except ConfigError as exc:
            # What was asked is checked by now: it is the swarm that cannot.
            raise PeerDisconnected(str(exc)) from exc


class SwarmDoor:
    """The best coordinator writes, be it this node or another.

    choose: the peer that should coordinate now; None for this node.
    """

    def __init__(
        self, here: EngineDoor | None, thin: ThinClient, choose: Callable[[], PeerId | None], deadline_s: float
    ) -> None:
        self._here = here
        self._thin = thin
        self._choose = choose
        self._deadline_s = deadline_s

    async def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece. Raises as `Door.write` does."""
        coordinator = self._choose()
        if coordinator is None and self._here is not None:
            answer = self._here.write(prompt, options, outcome)
        else:
            outcome.coordinator = coordinator or ""
            answer = self._thin.generate(prompt, options, self._deadline_s)
        start_s, first_s, first_size, num_tokens = trio.current_time(), 0.0, 0, 0
        async with aclosing(answer) as pieces:
            async for piece in pieces:
                if not num_tokens:
                    first_s, first_size = trio.current_time(), len(piece.tokens)
                num_tokens += len(piece.tokens)
                if outcome.coordinator:
                    # What can be seen from here; the rest is the coordinator's.
                    later_s, num_later = trio.current_time() - first_s, num_tokens - first_size
                    outcome.statistics = {
                        "ttft_s": first_s - start_s,
                        "later_s": later_s,
                        "num_later_tokens": num_later,
                        "tokens_per_s": num_later / later_s if later_s > 0 else 0.0,
                    }
                yield piece

"""Runs the spot checks of one audited request.

One check runs at a time, while the text is written. The text waits only for a check that is overdue.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from dsd_p2p.coordination.audit import Auditor, Turn
from dsd_p2p.errors import DishonestPeer
from dsd_p2p.session.effects import Carried, Effect
from dsd_p2p.types import TokenId
from dsd_p2p.wire.messages import Message, OpenSession, Verdict, Window

logger = logging.getLogger(__name__)


class SpotChecks:
    """The spot checks of one request, carried out by its auditor. distrust: called with the error that names a liar."""

    def __init__(self, auditor: Auditor, distrust: Callable[[DishonestPeer], None]) -> None:
        self._auditor = auditor
        self.distrust = distrust
        self._is_checking = False
        self._is_over = trio.Event()

    @property
    def num_checks(self) -> int:
        """Spot checks that were carried out."""
        return self._auditor.num_checks

    @property
    def num_unchecked(self) -> int:
        """Spot checks that no replica answered."""
        return self._auditor.num_unchecked

    @property
    def checked(self) -> Sequence[int]:
        """For each stage of the route, the position up to which it was checked."""
        return self._auditor.checked

    def follow(self, message: Message, num_committed: int) -> None:
        """Note that a message is sent to the stages; tokens at positions below `num_committed` are committed."""
        match message:
            case OpenSession(route=route, model=model):
                self._auditor.opened(route, model)
            case Window() as window:
                self._auditor.sent(window, num_committed)
            case _:
                pass

    def heard(self, verdict: Verdict) -> None:
        """Check the stages' signatures. Call this before acting on the verdict.

        Raises:
            DishonestPeer: names the stage whose signed rows differ from its neighbour's, or that did not sign.
        """
        self._auditor.heard(verdict)

    def heed(self, effects: Sequence[Effect]) -> Iterator[Effect]:
        """Note which nodes were committed, for the next spot check, and yield the other effects."""
        for effect in effects:
            if isinstance(effect, Carried):
                self._auditor.committed(effect.position, effect.epoch, effect.node)
            else:
                yield effect

    def start_if_due(
        self, tokens: Sequence[TokenId], nursery: trio.Nursery, done: Callable[[DishonestPeer | None], Awaitable[None]]
    ) -> None:
        """Start the spot check that is due, unless one is running. done: called with the liar's error, or None."""
        if self._is_checking:
            return
        turn = self._auditor.turn(tokens)
        if turn is not None:
            self._is_checking, self._is_over = True, trio.Event()
            nursery.start_soon(self._check, turn, done)

    async def wait_for_overdue(self) -> None:
        """Wait until an overdue spot check ends, so that the text does not run far past what was checked."""
        if self._is_checking and self._auditor.is_overdue:
            await self._is_over.wait()

    def ended(self) -> None:
        """Note that the check's result was handled; the next check may start."""
        self._is_checking = False

    async def _check(self, turn: Turn, done: Callable[[DishonestPeer | None], Awaitable[None]]) -> None:
        error = None
        try:
            await self._auditor.check(turn)
        except DishonestPeer as exc:
            error = exc
        except Exception:  # task boundary: a check that crashes says nothing about the stage
            logger.exception("spot check failed")
        finally:
            self._is_over.set()
        await done(error)

"""The spot checks of one audited request: one at a time, beside the text, which waits for an overdue one."""

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
    """Follows a request for its auditor. distrust: is told who lied."""

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
        """For each stage of the route, up to which position it was checked."""
        return self._auditor.checked

    def follow(self, message: Message, num_committed: int) -> None:
        """A message leaves for the stages; tokens below `num_committed` are committed."""
        match message:
            case OpenSession(route=route, model=model):
                self._auditor.opened(route, model)
            case Window() as window:
                self._auditor.sent(window, num_committed)
            case _:
                pass

    def heard(self, verdict: Verdict) -> None:
        """Check what the stages signed, before the verdict counts.

        Raises:
            DishonestPeer: names the stage that signed something else than its neighbour, or did not sign.
        """
        self._auditor.heard(verdict)

    def heed(self, effects: Sequence[Effect]) -> Iterator[Effect]:
        """Note at once which nodes were committed: the next spot check goes by it. Yields the other effects."""
        for effect in effects:
            if isinstance(effect, Carried):
                self._auditor.committed(effect.position, effect.epoch, effect.node)
            else:
                yield effect

    def start_if_due(
        self, tokens: Sequence[TokenId], nursery: trio.Nursery, done: Callable[[DishonestPeer | None], Awaitable[None]]
    ) -> None:
        """Start the spot check that is due, if one is and none is under way. done: is told who lied, None for nobody."""
        if self._is_checking:
            return
        turn = self._auditor.turn(tokens)
        if turn is not None:
            self._is_checking, self._is_over = True, trio.Event()
            nursery.start_soon(self._check, turn, done)

    async def wait_for_overdue(self) -> None:
        """Spot checks keep up with the text: what they would find must not be written far past."""
        if self._is_checking and self._auditor.is_overdue:
            await self._is_over.wait()

    def ended(self) -> None:
        """The check's result was heard: the next one may start."""
        self._is_checking = False

    async def _check(self, turn: Turn, done: Callable[[DishonestPeer | None], Awaitable[None]]) -> None:
        error = None
        try:
            await self._auditor.check(turn)
        except DishonestPeer as exc:
            error = exc
        except Exception:  # task boundary: a check that goes wrong says nothing of the stage
            logger.exception("spot check failed")
        finally:
            self._is_over.set()
        await done(error)

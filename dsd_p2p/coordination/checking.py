"""Runs the spot checks of one audited request.

One check runs at a time, while the text is written. The text waits only for a check that is overdue.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from dsd_p2p.coordination.audit import Auditor, Turn
from dsd_p2p.errors import AuditIncomplete, DishonestPeer, PeerError
from dsd_p2p.session.effects import Carried, Effect
from dsd_p2p.types import TokenId
from dsd_p2p.wire.messages import Message, OpenSession, Verdict, Window

logger = logging.getLogger(__name__)

_LAST_ATTEMPTS, _LAST_PAUSE_S = 4, 2.0


class SpotChecks:
    """The spot checks of one request, carried out by its auditor. distrust: called with the error that names a peer.

    is_over: True once `conclude` has ended. fault: what it found wrong with the answer, or None.
    """

    def __init__(self, auditor: Auditor, distrust: Callable[[DishonestPeer | AuditIncomplete], None]) -> None:
        self._auditor = auditor
        self.distrust = distrust
        self._is_checking = False
        self._is_idle = trio.Event()
        self._found: PeerError | None = None
        self.is_over = False
        self.fault: PeerError | None = None

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
            case OpenSession() as opened:
                self._auditor.opened(opened)
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
        self, tokens: Sequence[TokenId], nursery: trio.Nursery, done: Callable[[PeerError | None], Awaitable[None]]
    ) -> None:
        """Start the spot check that is due, unless one is running. done: called with the error that ends the answer."""
        if self._is_checking:
            return
        turn = self._auditor.turn(tokens)
        if turn is not None:
            self._is_checking, self._is_idle = True, trio.Event()
            nursery.start_soon(self._check_aside, turn, done)

    async def wait_for_overdue(self) -> None:
        """Wait until an overdue spot check ends, so that the text does not run far past what was checked."""
        if self._is_checking and self._auditor.is_overdue:
            await self._is_idle.wait()

    def ended(self) -> None:
        """Note that the outcome of the running check has been taken in."""
        self._is_checking = False

    async def conclude(self, tokens: Sequence[TokenId]) -> None:
        """Check all stages up to the end of the text, and set `fault`."""
        self.fault = await self._check_rest(tokens)
        self.is_over = True

    @property
    def is_whole(self) -> bool:
        """True if every position of the answer was checked."""
        return self.is_over and self.fault is None

    def verdict(self) -> PeerError | None:
        """Return what is wrong with an answer that has ended, or None if all of it was checked."""
        if not self.is_over:
            return AuditIncomplete("the answer ended before its stages were checked: ask again")
        return self.fault

    async def _check_rest(self, tokens: Sequence[TokenId]) -> PeerError | None:
        if self._is_checking:
            await self._is_idle.wait()
        if self._found is not None:
            return self._found
        for attempt in range(_LAST_ATTEMPTS):
            if attempt:
                # Replicas may have been busy with other checks.
                await trio.sleep(_LAST_PAUSE_S)
            for turn in self._auditor.last_turns(tokens):
                if (error := await self._check(turn)) is not None:
                    return error
            if self._auditor.missing(len(tokens)) is None:
                return None
        return self._auditor.missing(len(tokens))

    async def _check_aside(self, turn: Turn, done: Callable[[PeerError | None], Awaitable[None]]) -> None:
        try:
            self._found = await self._check(turn)
        finally:
            self._is_idle.set()
        await done(self._found)

    async def _check(self, turn: Turn) -> PeerError | None:
        """Carry out one check; return the error that ends the answer, or None. A lost stage is the route's matter."""
        try:
            await self._auditor.check(turn)
        except (DishonestPeer, AuditIncomplete) as exc:
            return exc
        except PeerError as exc:
            logger.warning("spot check not carried out peer=%s error=%s", turn.stage.peer, exc)
        except Exception:  # task boundary: a failed check must not end the answer
            logger.exception("spot check failed")
        return None

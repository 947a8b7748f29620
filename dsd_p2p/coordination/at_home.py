"""Drafts one request with this process's own drafter; a drafter that fails costs only guesses."""

import logging

import trio

from dsd_p2p.coordination.draft_places import Offer
from dsd_p2p.drafting.base import Drafter, DraftSession
from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.errors import CapacityError
from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import Sampling

logger = logging.getLogger(__name__)


class AtHome:
    """The drafter's session for one request; prompt lookup if the drafter has no room for another one.

    step_s: the usual seconds of one of its steps. offer: what it promises. is_broken: it failed, and drafts no more.
    is_used: it has drafted before. The first draft also reads the text.
    """

    def __init__(self, drafter: Drafter, max_length: int, sampling: Sampling, step_s: float) -> None:
        drafter, self._session = _open(drafter, max_length, sampling)
        self.is_instant = drafter.is_instant
        self.offer = Offer(drafter=drafter.name, step_s=0.0 if self.is_instant else step_s, round_trip_s=0.0)
        self.is_broken = self.is_used = False
        self._lock = trio.Lock()

    def expand_now(self, draft: Draft) -> list[list[Candidate]]:
        """Return the candidates for each stem; none where drafting failed."""
        if not self.is_broken:
            try:
                return self._session.expand(draft)
            except Exception:  # a failed guess must not cost the answer
                logger.exception("drafter failed, going on without it")
                self.is_broken = True
        return [[] for _ in draft.stems]

    async def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return the same from a worker thread, if it takes time."""
        if self.is_instant:
            return self.expand_now(draft)
        async with self._lock:
            return await trio.to_thread.run_sync(self.expand_now, draft)

    def close(self) -> None:
        """Free the request's resources."""
        self._session.close()


def _open(drafter: Drafter, max_length: int, sampling: Sampling) -> tuple[Drafter, DraftSession]:
    try:
        return drafter, drafter.open(max_length, sampling)
    except CapacityError as exc:
        logger.info("drafter has no room, using prompt lookup error=%s", exc)
        return LOOKUP, LOOKUP.open(max_length, sampling)

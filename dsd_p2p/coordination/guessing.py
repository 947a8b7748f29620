"""Runs a request's drafter such that its failure costs only the guesses, never the answer."""

import logging

from dsd_p2p.drafting.base import Drafter, DraftSession
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import CapacityError
from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import Sampling

logger = logging.getLogger(__name__)

_LOOKUP = NgramDrafter()


class Guesses:
    """A drafter in use by one request. is_instant: the drafter answers at once and needs no thread."""

    def __init__(self, drafter: Drafter, session: DraftSession) -> None:
        self.name = drafter.name
        self.is_instant = drafter.is_instant
        self._session = session
        self._is_broken = False

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return the drafter's candidates for each stem; empty lists once the drafter has failed."""
        if not self._is_broken:
            try:
                return self._session.expand(draft)
            except Exception:  # a failed guess must not cost the answer
                logger.exception("drafter failed, going on without it")
                self._is_broken = True
        return [[] for _ in draft.stems]

    def close(self) -> None:
        """Free the drafter's state for this request."""
        self._session.close()


def open_guesses(drafter: Drafter, max_length: int, sampling: Sampling) -> Guesses:
    """Start a drafter on a request, or prompt lookup if the drafter has no room for another request."""
    try:
        return Guesses(drafter, drafter.open(max_length, sampling))
    except CapacityError as exc:
        logger.info("drafter has no room, using prompt lookup error=%s", exc)
        return Guesses(_LOOKUP, _LOOKUP.open(max_length, sampling))

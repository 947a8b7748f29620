"""A request's drafter, whose failure never costs more than its guesses."""

import logging

from dsd_p2p.drafting.base import Drafter, DraftSession
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import CapacityError
from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import Sampling

logger = logging.getLogger(__name__)

_LOOKUP = NgramDrafter()


class Guesses:
    """One request's use of a drafter. is_instant: it answers at once, without a thread."""

    def __init__(self, drafter: Drafter, session: DraftSession) -> None:
        self.name = drafter.name
        self.is_instant = drafter.is_instant
        self._session = session
        self._is_broken = False

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Ask the drafter; one that fails is not asked again, and the text goes on without it."""
        if not self._is_broken:
            try:
                return self._session.expand(draft)
            except Exception:  # a guess is never worth the answer
                logger.exception("drafter failed, going on without it")
                self._is_broken = True
        return [[] for _ in draft.stems]

    def close(self) -> None:
        """Free what the drafter keeps of the request."""
        self._session.close()


def open_guesses(drafter: Drafter, max_length: int, sampling: Sampling) -> Guesses:
    """Start a drafter on a request; prompt lookup where it has no room for another one."""
    try:
        return Guesses(drafter, drafter.open(max_length, sampling))
    except CapacityError as exc:
        logger.info("drafter has no room, looking up instead error=%s", exc)
        return Guesses(_LOOKUP, _LOOKUP.open(max_length, sampling))

"""The seam between the coordinator and what guesses. Every implementation passes `tests/drafting/test_drafting.py`."""

from typing import Protocol

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import GREEDY, Sampling


class DraftSession(Protocol):
    """A drafter at work on one request."""

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return for each stem at most `draft.width` children, likeliest first, no token twice; none is a fine answer.

        Called in a worker thread unless the drafter is instant, never twice at a time.
        """
        ...

    def close(self) -> None:
        """Free what the request held."""
        ...


class Drafter(Protocol):
    """Something that guesses; shared by the requests of a process."""

    @property
    def name(self) -> str:
        """What to call it in statistics."""
        ...

    @property
    def is_instant(self) -> bool:
        """True when a draft takes microseconds, so that a thread would cost more than it."""
        ...

    def open(self, max_length: int, sampling: Sampling = GREEDY) -> DraftSession:
        """Start on a request whose text grows to at most `max_length` tokens.

        sampling: how the target will pick. A drafter that samples with the same noise guesses better.

        Raises:
            CapacityError: there is no memory for it.
        """
        ...

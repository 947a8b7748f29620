"""The interface between coordinator and drafters. Every implementation passes `tests/drafting/test_drafting.py`."""

from typing import Protocol

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import GREEDY, Sampling


class DraftSession(Protocol):
    """A drafter at work on one request."""

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return for each stem up to `draft.width` children with distinct tokens, likeliest first; none is fine.

        Runs in a worker thread unless the drafter is instant. Calls never overlap.
        """
        ...

    def close(self) -> None:
        """Free the request's resources."""
        ...


class Drafter(Protocol):
    """A source of drafts, shared by all requests of a process."""

    @property
    def name(self) -> str:
        """The drafter's name in statistics."""
        ...

    @property
    def is_instant(self) -> bool:
        """True when a draft takes microseconds, less than handing it to a thread would cost."""
        ...

    def open(self, max_length: int, sampling: Sampling = GREEDY) -> DraftSession:
        """Open a session for a request whose text grows to at most `max_length` tokens.

        sampling: how the target will pick. A drafter that samples with the same noise guesses better.

        Raises:
            CapacityError: there is not enough memory for the request.
        """
        ...

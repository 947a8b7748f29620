"""Drafts one request, here or at a peer, such that a failure costs only guesses, never the answer.

How it works. While a request runs, `DraftPlaces` rates this process's own drafter and the members that offer drafts. A
request starts here if that promises most, otherwise with prompt lookup. When another place promises clearly more, the
request opens a session there and lets it read the text. Only when the new place has answered does the request move, so
the reading holds up nothing. A place that is late, lost or lies is left at once: prompt lookup answers until the next
place is ready. All methods run in the request's task.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from dsd_p2p.coordination.at_home import AtHome
from dsd_p2p.coordination.draft_places import HOME, DraftPlaces, Offer
from dsd_p2p.coordination.far_drafts import FarDrafts, FarSession
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.drafting.choice import Loop
from dsd_p2p.drafting.guided import Guide
from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.errors import PeerError, RemoteProtocolError
from dsd_p2p.session.effects import Candidate, Draft, Stem
from dsd_p2p.types import ModelKey, PeerId, Sampling, TokenId, short_peer

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
"""Pause between two comparisons of places."""

_WARM_TIMEOUT_S = 20.0
"""Time that a new place gets to read the text."""

_LATE, _LATE_S, _LATEST_S = 4.0, 0.3, 0.7
"""An answer is late 0.3 s after four times the usual time, and after 0.7 s at the latest: so a pause stays under 1 s."""

_COVERED = 2
"""Candidates that count as a level of the tree, as in `dsd_p2p.drafting.measuring`."""

_MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """What a request needs to draft at other members.

    loop: returns what its route takes. moved: called with the expected seconds of a level at the new place.
    """

    places: DraftPlaces
    far: FarDrafts
    model: ModelKey
    loop: Callable[[], Loop]
    moved: Callable[[float], None] = lambda _level_s: None


class Guesses:
    """The drafts of one request.

    home: this process's drafter. step_s: the usual seconds of one of its steps. elsewhere: None: draft only here.
    guide: keeps the drafts within the request's constraint, if it has one.
    """

    def __init__(
        self,
        home: Drafter,
        max_length: int,
        sampling: Sampling,
        step_s: float = 0.0,
        elsewhere: Elsewhere | None = None,
        guide: Guide | None = None,
    ) -> None:
        self._guide = guide
        self._home = AtHome(home, max_length, sampling, step_s)
        self._lookup = LOOKUP.open(max_length, sampling)
        self._opening = (max_length, sampling)
        self._elsewhere = elsewhere
        self._far: FarSession | None = None
        self._offer = self._home.offer
        self._warming: trio.CancelScope | None = None
        self._is_lost = elsewhere is not None and self._best(elsewhere, None) != HOME
        self._looked_at_s = 0.0
        self._outcomes = _Outcomes()

    @property
    def name(self) -> str:
        """The name of the drafter in use, with its peer if that is another one."""
        if self._far is not None:
            return f"{self._offer.drafter} at {short_peer(self._far.peer)}"
        return LOOKUP.name if self._is_lost or self._home.is_broken else self._home.offer.drafter

    @property
    def is_instant(self) -> bool:
        """True when the next draft takes no measurable time, and `expand_now` may be used."""
        is_instant = self._far is None and (self._home.is_instant or self._is_lost)
        return is_instant and self._elsewhere is None and self._guide is None

    def expand_now(self, draft: Draft) -> list[list[Candidate]]:
        """Return the candidates for each stem at once; only while `is_instant`."""
        return self._home.expand_now(draft)

    async def expand(self, draft: Draft, nursery: trio.Nursery) -> list[list[Candidate]]:
        """Return the candidates for each stem; none where drafting failed. nursery: for the move to another place."""
        if self._elsewhere is not None:
            self._count_hits(draft, self._elsewhere.places)
        self.look_around(draft.tokens, nursery)
        asked = None if self._is_lost else (self._place, self._offer)
        if self._far is not None:
            found = await self._ask_far(self._far, draft)
        elif self._is_lost:
            found = self._lookup.expand(draft)
        else:
            started_s = trio.current_time()
            found = await self._home.expand(draft)
            if self._elsewhere is not None and self._home.is_used and not self._home.is_instant:
                now_s = trio.current_time()
                self._elsewhere.places.took(HOME, self._home.offer, now_s - started_s, now_s)
            self._home.is_used = True
        if asked == (self._place, self._offer) and not self._is_lost:
            self._outcomes.remember(*asked, draft, found)
        return found if self._guide is None else await trio.to_thread.run_sync(self._guide.guided, draft, found)

    async def close(self) -> None:
        """Free the drafters' state for this request."""
        if self._warming is not None:
            self._warming.cancel()
        if self._far is not None:
            await self._far.close()
        self._home.close()
        self._lookup.close()

    # Where to draft

    def look_around(self, tokens: Sequence[TokenId], nursery: trio.Nursery) -> None:
        """Begin to move if another place promises more. Compares at most twice a second. tokens: the text so far.

        A policy that does not speculate asks for no drafts, perhaps because they are slow here: so this is called
        without a draft too.
        """
        now_s = trio.current_time()
        if self._elsewhere is None or self._warming is not None or now_s - self._looked_at_s < _LOOK_S:
            return
        self._looked_at_s = now_s
        present = self._place
        best = self._best(self._elsewhere, present)
        if best == HOME and present == HOME:
            self._is_lost = False
        elif best == HOME:
            nursery.start_soon(self._settle, None, self._home.offer, self._elsewhere)
        elif best != present:
            self._warming = trio.CancelScope(deadline=now_s + _WARM_TIMEOUT_S)
            nursery.start_soon(self._move, best, tuple(tokens), self._warming, self._elsewhere)

    @property
    def _place(self) -> PeerId:
        return self._far.peer if self._far is not None else HOME

    def _best(self, elsewhere: Elsewhere, present: PeerId | None) -> PeerId:
        return elsewhere.places.best(self._home.offer, elsewhere.loop(), present, trio.current_time())

    async def _move(
        self, place: PeerId, tokens: tuple[TokenId, ...], scope: trio.CancelScope, elsewhere: Elsewhere
    ) -> None:
        """Let `place` read the text, then draft there."""
        question = Draft(tokens=tokens, keys=range(len(tokens)), stems=(Stem(key=0, path=()),), width=1)
        offer, session, is_ready = elsewhere.places.offers().get(place), elsewhere.far.session(place), False
        try:
            with scope:
                await session.open(elsewhere.model, *self._opening)
                await session.expand(question, 1, _WARM_TIMEOUT_S, "")
                is_ready = offer is not None
        except PeerError as exc:
            elsewhere.places.failed(place, trio.current_time(), is_liar=isinstance(exc, RemoteProtocolError))
            logger.info("no drafts from peer=%s error=%s", place, exc)
        finally:
            self._warming = None
            if not is_ready:
                await session.close()
        if is_ready and offer is not None:
            await self._settle(session, offer, elsewhere)

    async def _settle(self, session: FarSession | None, offer: Offer, elsewhere: Elsewhere) -> None:
        """Draft with `session` from now on, or here if there is none. offer: what is drafted with there."""
        before, self._far, self._offer, self._is_lost = self._far, session, offer, False
        logger.info("drafting moved to=%s", self.name)
        elsewhere.moved(elsewhere.places.level_s(self._place, offer, trio.current_time()))
        if before is not None:
            await before.close()

    async def _ask_far(self, far: FarSession, draft: Draft) -> list[list[Candidate]]:
        assert self._elsewhere is not None
        places, offer = self._elsewhere.places, self._offer
        # A synchronous window has room for so many levels; other trees take what comes.
        levels = min(offer.levels, draft.levels) if draft.levels > 1 else offer.levels
        deadline_s = min(_LATEST_S, _LATE_S + _LATE * offer.level_s * levels)
        started_s = trio.current_time()
        try:
            found = await far.expand(draft, levels, deadline_s, self.name)
        except PeerError as exc:
            if self._far is not far:
                # The request has moved on while it asked.
                return self._lookup.expand(draft)
            places.failed(far.peer, trio.current_time(), is_liar=isinstance(exc, RemoteProtocolError))
            logger.warning("drafting peer left peer=%s error=%s", far.peer, exc)
            self._far, self._offer, self._is_lost, self._looked_at_s = None, self._home.offer, True, 0.0
            await far.close()
            return self._lookup.expand(draft)
        now_s = trio.current_time()
        places.took(far.peer, offer, (now_s - started_s) / levels, now_s)
        return found

    def _count_hits(self, draft: Draft, places: DraftPlaces) -> None:
        """Count for each place how often the next token was among its first guesses."""
        for place, offer, is_hit in self._outcomes.of(draft):
            places.outcome(place, offer, is_hit=is_hit)


class _Outcomes:
    """Remembers the first guesses after each node, and tells which were right once the text has grown."""

    def __init__(self) -> None:
        self._guessed: dict[int, tuple[PeerId, Offer, tuple[TokenId, ...]]] = {}
        self._num_told = 1

    def of(self, draft: Draft) -> list[tuple[PeerId, Offer, bool]]:
        """Return who guessed each new token of the text, and whether it was among the guesses."""
        outcomes = []
        for index in range(self._num_told, len(draft.tokens)):
            guessed = self._guessed.pop(draft.keys[index - 1], None)
            if guessed is not None:
                place, offer, tokens = guessed
                outcomes.append((place, offer, draft.tokens[index] in tokens))
        self._num_told = max(1, len(draft.tokens))
        return outcomes

    def remember(self, place: PeerId, offer: Offer, draft: Draft, found: list[list[Candidate]]) -> None:
        """Remember the answers of `place` to `draft`."""
        if len(self._guessed) > _MAX_REMEMBERED:
            self._guessed.clear()
        for stem, candidates in zip(draft.stems, found, strict=True):
            tokens = tuple(candidate.token for candidate in candidates[:_COVERED])
            self._guessed[stem.key] = (place, offer, tokens)

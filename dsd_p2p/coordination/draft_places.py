"""Rates the places where a request could be drafted: this process, and the members nearby that offer it.

A place is rated by the tokens a second that its drafter promises: how often it is right, the time of a step, the trip
there. Members' records say what they offer. What was measured here replaces what they say, so an idle boast lasts for
a few answers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dsd_p2p.drafting.choice import Loop
from dsd_p2p.drafting.measuring import Coverage
from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.placement.coordinator import expected_coverage
from dsd_p2p.placement.view import Speculation, seconds_per_token
from dsd_p2p.types import PeerId
from dsd_p2p.wire.drafts import MAX_LEVELS

HOME = PeerId("")
"""The place of drafts that this process makes itself."""

_LEAST_STEP_S = 1e-3
"""No model drafts faster: a record that says so means prompt lookup, or boasts."""

_NEWEST = 0.2
"""Weight of the newest time of a level."""

_STALE_S = 60.0
"""A time measured longer ago counts no more: the place may have been busy, and is only measured while it is used."""

_MIN_LEAD = 1.15
"""Another place must promise this much more: a move costs the new place the reading of the text."""

_AVOID_S, _AVOID_LIAR_S = 15.0, 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a member says of its drafter, and the measured seconds there and back."""

    drafter: str
    step_s: float
    round_trip_s: float

    @property
    def levels(self) -> int:
        """The levels to ask for at once: more on a longer trip, so that the trip is shared."""
        return max(1, min(MAX_LEVELS // 2, round(1 + self.round_trip_s / max(self.step_s, _LEAST_STEP_S))))

    @property
    def level_s(self) -> float:
        """The expected seconds of a level."""
        if self.drafter == LOOKUP.name:
            return 0.0
        return max(self.step_s, _LEAST_STEP_S) + self.round_trip_s / self.levels


@dataclass(slots=True, kw_only=True)
class _Measured:
    coverage: Coverage
    level_s: float = 0.0
    at_s: float = -math.inf


@dataclass(slots=True)
class DraftPlaces:
    """What is known of all places, shared by the requests of a process. offers: returns what members offer now."""

    offers: Callable[[], Mapping[PeerId, Offer]]
    _measured: dict[tuple[PeerId, str], _Measured] = field(default_factory=dict)
    _avoided_until_s: dict[PeerId, float] = field(default_factory=dict)

    def best(self, home: Offer, loop: Loop, present: PeerId | None, now_s: float) -> PeerId:
        """Return the place to draft at. home: this process's own drafter. present: where the request drafts now."""
        offers = {HOME: home, **self._open_offers(now_s)}
        rates = {place: self._tokens_per_s(place, offer, loop, now_s) for place, offer in offers.items()}
        best = max(rates, key=lambda place: (rates[place], place == HOME))
        stays = present if present in rates else HOME
        return best if rates[best] > _MIN_LEAD * rates[stays] else stays

    def level_s(self, place: PeerId, offer: Offer, now_s: float) -> float:
        """Return the expected seconds of a level at `place`: as measured of late, or else as it says."""
        known = self._of(place, offer)
        return known.level_s if now_s - known.at_s < _STALE_S else offer.level_s

    def took(self, place: PeerId, offer: Offer, level_s: float, now_s: float) -> None:
        """Note how long one level took at `place`, trip included."""
        known, before_s = self._of(place, offer), self.level_s(place, offer, now_s)
        known.level_s = before_s + _NEWEST * (level_s - before_s) if known.level_s else level_s
        known.at_s = now_s

    def outcome(self, place: PeerId, offer: Offer, *, is_hit: bool) -> None:
        """Note whether the next token was among the guesses of `place`."""
        self._of(place, offer).coverage.add([is_hit])

    def failed(self, place: PeerId, now_s: float, *, is_liar: bool) -> None:
        """Avoid a place for a while."""
        self._avoided_until_s[place] = now_s + (_AVOID_LIAR_S if is_liar else _AVOID_S)

    def _open_offers(self, now_s: float) -> dict[PeerId, Offer]:
        return {
            place: offer
            for place, offer in self.offers().items()
            if self._avoided_until_s.get(place, 0.0) <= now_s and offer.step_s > 0
        }

    def _of(self, place: PeerId, offer: Offer) -> _Measured:
        fresh = _Measured(coverage=Coverage(prior=expected_coverage(offer.drafter)))
        return self._measured.setdefault((place, offer.drafter), fresh)

    def _tokens_per_s(self, place: PeerId, offer: Offer, loop: Loop, now_s: float) -> float:
        coverage = self._of(place, offer).coverage.rate
        speculation = Speculation(coverage=coverage, draft_s=self.level_s(place, offer, now_s))
        return 1 / seconds_per_token(loop.traversal_s, loop.slowest_s, speculation)

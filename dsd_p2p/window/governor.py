"""Turns speculation off while it slows all of a coordinator's requests together, by measurement.

One request's gain from speculation can be the others' loss: drafts compete for the coordinator's cores and windows for
the stages' arithmetic, and no request sees this in its own rates. So the governor counts the tokens of all requests
together, with speculation and without, for each power of two of requests at once, and keeps the better. It tries the
other now and then, less often each time it loses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dsd_p2p.window.base import Decision, Observation, WindowPolicy
from dsd_p2p.window.static import PLAIN

_SETTLE_S = 0.5
"""Pause after a change, because the first tokens still come from the windows before it."""

_SPAN_S = 1.5
"""Seconds that are counted before a rate is taken."""

_FIRST_SPAN_S = 6.0
"""The first count takes four spans: requests are still arriving, and the first rate decides what is tried next."""

_SHORT_S, _LOST = 0.5, 0.8
"""A trial that is far behind after this long has lost."""

_NEWEST = 0.5
"""Weight of the newest rate: two counts that disagree with the past outweigh it."""

_LEAD = 1.03
"""The other way must be 3 % faster to be taken: less is noise between two spans."""

_FIRST_RETRY_S, _MAX_RETRY_S = 30.0, 480.0
"""The pause before the loser is tried again doubles from 30 s to 8 min. One trial takes 5 % of the first, 0.3 % of the last."""

_MANY = 8
"""This many requests at once, or more, begin without speculation, because it seldom pays there."""


@dataclass(slots=True)
class _Rate:
    tokens_per_s: float
    at_s: float

    def add(self, tokens_per_s: float, now_s: float) -> None:
        self.tokens_per_s += _NEWEST * (tokens_per_s - self.tokens_per_s)
        self.at_s = now_s


class Governor:
    """Counts the tokens of all requests of one coordinator. All times are seconds of one clock, whichever it is."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._is_speculating = True
        self._counted_from_s = 0.0
        self._num_tokens = 0
        self._rates: dict[tuple[int, bool], _Rate] = {}
        self._retry_s: dict[int, float] = {}

    def joined(self, now_s: float) -> None:
        """Count a request that begins."""
        self._count(self.num_requests + 1, now_s)

    def left(self, now_s: float) -> None:
        """Stop counting a request that is over."""
        self._count(self.num_requests - 1, now_s)

    def committed(self, num_tokens: int, now_s: float) -> None:
        """Count tokens that any request got."""
        if now_s >= self._counted_from_s:
            self._num_tokens += num_tokens

    def allows(self, now_s: float) -> bool:
        """True when requests may speculate now."""
        if self.num_requests < 2:
            return True
        seconds = now_s - self._counted_from_s
        if seconds >= self._span_s or (seconds >= _SHORT_S and self._is_losing(self._num_tokens / seconds)):
            self._take_rate(self._num_tokens / seconds, now_s)
        return self._is_speculating

    def _is_losing(self, tokens_per_s: float) -> bool:
        """True if the alternative is so much better that counting on is pointless."""
        other = self._rates.get((self._size, not self._is_speculating))
        return other is not None and tokens_per_s < _LOST * other.tokens_per_s

    def reason(self) -> str:
        """Return, for people, why requests may not speculate."""
        here = self._rates.get((self._size, False))
        there = self._rates.get((self._size, True))
        if here is None or there is None:
            return f"{self.num_requests} requests at once: measuring them without speculation"
        return (
            f"{self.num_requests} requests at once: {here.tokens_per_s:.1f} tokens/s in all, "
            f"with speculation {there.tokens_per_s:.1f}"
        )

    @property
    def _span_s(self) -> float:
        """Seconds to count now. Few requests get longer at first, because their policies must find a good window."""
        is_first = self._is_speculating and self.num_requests < _MANY and (self._size, True) not in self._rates
        return _FIRST_SPAN_S if is_first else _SPAN_S

    @property
    def _size(self) -> int:
        return self.num_requests.bit_length()

    def _count(self, num_requests: int, now_s: float) -> None:
        size = self._size
        self.num_requests = num_requests
        if self._size != size:
            plain, speculating = (self._rates.get((self._size, mode)) for mode in (False, True))
            if plain is not None and speculating is not None:
                self._is_speculating = speculating.tokens_per_s >= plain.tokens_per_s
            elif plain is None and speculating is None and num_requests >= _MANY:
                self._is_speculating = False
            self._start(now_s)

    def _start(self, now_s: float) -> None:
        self._counted_from_s, self._num_tokens = now_s + _SETTLE_S, 0

    def _take_rate(self, tokens_per_s: float, now_s: float) -> None:
        key = (self._size, self._is_speculating)
        rate = self._rates.setdefault(key, _Rate(tokens_per_s, now_s))
        rate.add(tokens_per_s, now_s)
        self._counted_from_s, self._num_tokens = now_s, 0
        other = self._rates.get((self._size, not self._is_speculating))
        if other is None:
            self._change(now_s)
        elif other.tokens_per_s > _LEAD * rate.tokens_per_s:
            # The mode on trial has lost, or the kept one has become worse.
            self._retry_s[self._size] = min(_MAX_RETRY_S, 2 * self._retry_s.get(self._size, _FIRST_RETRY_S / 2))
            self._change(now_s)
        elif now_s - other.at_s > self._retry_s.get(self._size, _FIRST_RETRY_S):
            self._change(now_s)

    def _change(self, now_s: float) -> None:
        self._is_speculating = not self._is_speculating
        self._start(now_s)


class GovernedPolicy:
    """A policy that asks the request's own policy while the governor allows speculation, else decides plain.

    clock: the governor's.
    """

    def __init__(self, policy: WindowPolicy, governor: Governor, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._governor = governor
        self._clock = clock

    def decide(self, observation: Observation) -> Decision:
        """Return the decision from now on."""
        if self._governor.allows(self._clock()):
            return self._policy.decide(observation)
        return replace(PLAIN, reason=self._governor.reason())


class Share:
    """One request in the governor's count, from its first token on: a prompt writes no tokens. clock: in seconds."""

    def __init__(self, governor: Governor, clock: Callable[[], float]) -> None:
        self._governor = governor
        self._clock = clock
        self._is_counted = False

    def committed(self, num_tokens: int) -> None:
        """Count the tokens that this request got."""
        if not self._is_counted:
            self._is_counted = True
            self._governor.joined(self._clock())
        self._governor.committed(num_tokens, self._clock())

    def left(self) -> None:
        """Stop counting this request."""
        if self._is_counted:
            self._governor.left(self._clock())

"""What a coordinator knows to be parked at its stages: whose text, and over which route."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.session.request import Route
from dsd_p2p.stage.parking import PARKED_S
from dsd_p2p.types import HiddenFormat, TokenId
from dsd_p2p.wire.messages import Prefix

_MAX_TEXTS = 64
_MIN_TOKENS = 16
"""Fewer are computed as fast as they are copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Who shares a text, and where it is: the owner's requests over one route, with the same values on its links."""

    owner: str
    stages: tuple[str, ...]
    hidden_format: HiddenFormat


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Text:
    scope: Scope
    route: Route
    tokens: NDArray[np.int64]
    at_s: float


def scope_of(owner: str, route: Route, hidden_format: HiddenFormat) -> Scope:
    """Return where a request of `owner` may find text."""
    stages = (f"{hop.peer} {hop.span}" for hop in route.hops)
    return Scope(owner=owner, stages=(repr(route.model), *stages), hidden_format=hidden_format)


class PrefixIndex:
    """The parked texts, the one used last at the end."""

    def __init__(self) -> None:
        self._texts: OrderedDict[bytes, _Text] = OrderedDict()

    def find(self, scope: Scope, prompt: Sequence[TokenId], now_s: float) -> Prefix | None:
        """Return the longest parked text that `prompt` begins with; its last token is always left to send."""
        for name in [name for name, text in self._texts.items() if now_s - text.at_s > PARKED_S]:
            del self._texts[name]
        tokens = np.asarray(prompt[:-1], np.int64)
        lengths = {name: _common(text.tokens, tokens) for name, text in self._texts.items() if text.scope == scope}
        if not lengths:
            return None
        longest = max(lengths, key=lengths.__getitem__)
        if lengths[longest] < _MIN_TOKENS:
            return None
        self._texts.move_to_end(longest)
        return Prefix(session=longest, num_tokens=lengths[longest])

    def add(
        self, scope: Scope, route: Route, session: bytes, tokens: Sequence[TokenId], now_s: float
    ) -> list[tuple[bytes, Route]]:
        """Take in a text that the stages of `route` have parked; returns those that are of no use beside it, or too many."""
        added = _Text(scope=scope, route=route, tokens=np.asarray(tokens, np.int64), at_s=now_s)
        needless = [
            name
            for name, text in self._texts.items()
            if text.scope == scope and _common(text.tokens, added.tokens) == len(text.tokens)
        ]
        self._texts[session] = added
        surplus = [name for name in self._texts if name not in needless][:-_MAX_TEXTS]
        return [(name, self._texts.pop(name).route) for name in [*needless, *surplus]]

    def forget(self, session: bytes) -> Route | None:
        """A stage no longer holds it; returns over which route others might."""
        text = self._texts.pop(session, None)
        return text.route if text is not None else None


def _common(left: NDArray[np.int64], right: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(left[:size] != right[:size])
    return int(differs[0]) if len(differs) else size

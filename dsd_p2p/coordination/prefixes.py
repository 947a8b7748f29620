"""Keeps a coordinator's index of the texts parked at stages, by owner and route."""

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
"""Shortest prefix worth using: computing fewer tokens is as fast as copying them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The requests that may share a parked text: those of one owner, over one route, with one hidden format."""

    owner: str
    stages: tuple[str, ...]
    hidden_format: HiddenFormat


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Text:
    scope: Scope
    route: Route
    tokens: NDArray[np.int64]
    num_prompt: int
    at_s: float


def scope_of(owner: str, route: Route, hidden_format: HiddenFormat) -> Scope:
    """Return the scope in which a request of `owner` may find parked text."""
    stages = (f"{hop.peer} {hop.span}" for hop in route.hops)
    return Scope(owner=owner, stages=(repr(route.model), *stages), hidden_format=hidden_format)


class PrefixIndex:
    """An index of the parked texts, the most recently used last.

    can_cut: False for a model with recurrent layers: its stages go on from the end of a text, or from just before the
        end of its prompt, and from nowhere else.
    """

    def __init__(self, *, can_cut: bool = True) -> None:
        self._can_cut = can_cut
        self._texts: OrderedDict[bytes, _Text] = OrderedDict()

    def find(self, scope: Scope, prompt: Sequence[TokenId], now_s: float) -> Prefix | None:
        """Return the longest parked beginning of `prompt` that is of use, or None. It never has the last token."""
        for name in [name for name, text in self._texts.items() if now_s - text.at_s > PARKED_S]:
            del self._texts[name]
        tokens = np.asarray(prompt[:-1], np.int64)
        lengths = {name: self._usable(text, tokens) for name, text in self._texts.items() if text.scope == scope}
        if not lengths:
            return None
        longest = max(lengths, key=lengths.__getitem__)
        if lengths[longest] < _MIN_TOKENS:
            return None
        self._texts.move_to_end(longest)
        return Prefix(session=longest, num_tokens=lengths[longest])

    def _usable(self, text: _Text, tokens: NDArray[np.int64]) -> int:
        common = _common(text.tokens, tokens)
        if self._can_cut or common == len(text.tokens):
            return common
        return text.num_prompt - 1 if common >= text.num_prompt - 1 else 0

    def add(
        self, scope: Scope, route: Route, session: bytes, tokens: Sequence[TokenId], num_prompt: int, now_s: float
    ) -> list[tuple[bytes, Route]]:
        """Add a text that the stages of `route` have parked. num_prompt: how many of its tokens are the prompt's.

        Returns the session and route of each text to discard: those that the new one contains, and the oldest beyond
        the limit.
        """
        added = _Text(scope=scope, route=route, tokens=np.asarray(tokens, np.int64), num_prompt=num_prompt, at_s=now_s)
        needless = [
            name
            for name, text in self._texts.items()
            if text.scope == scope and _common(text.tokens, added.tokens) == len(text.tokens)
        ]
        self._texts[session] = added
        surplus = [name for name in self._texts if name not in needless][:-_MAX_TEXTS]
        return [(name, self._texts.pop(name).route) for name in [*needless, *surplus]]

    def forget(self, session: bytes) -> Route | None:
        """Remove a text that a stage no longer holds; return its route, where other stages may still hold it."""
        text = self._texts.pop(session, None)
        return text.route if text is not None else None


def _common(left: NDArray[np.int64], right: NDArray[np.int64]) -> int:
    """Return the length of the common prefix."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(left[:size] != right[:size])
    return int(differs[0]) if len(differs) else size

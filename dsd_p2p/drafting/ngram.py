"""Prompt lookup: proposes the tokens that followed the same few tokens earlier in the prompt or the text.

This is prompt lookup decoding (Saxena 2023) with two changes. It counts followers instead of taking the first match,
and it learns its confidence from the text: how often lookups of each match length were right for the tokens committed
so far.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from msgspec.structs import replace

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import GREEDY, Sampling, TokenId

_NAME = "ngram"
_MAX_MATCH_TOKENS = 4
"""The most tokens that are looked up. Each length costs one dictionary entry for every token of the text."""

_PRIOR_HITS, _PRIOR_TRIES = 1.0, 2.0
"""Before anything is known, a match is right every other time."""


class NgramDrafter:
    """A drafter that needs no model and no measurable time."""

    name = _NAME
    is_instant = True

    def open(self, max_length: int, sampling: Sampling = GREEDY) -> "NgramSession":
        """Open a session for a request."""
        return NgramSession()


class NgramSession:
    """The n-grams of one request's text."""

    def __init__(self) -> None:
        self._followers: dict[tuple[TokenId, ...], Counter[TokenId]] = defaultdict(Counter)
        self._num_indexed = 0
        self._hits = [_PRIOR_HITS] * (_MAX_MATCH_TOKENS + 1)
        self._tries = [_PRIOR_TRIES] * (_MAX_MATCH_TOKENS + 1)

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Look up the last tokens of each stem."""
        self._index(draft.tokens)
        recent = list(draft.tokens[-_MAX_MATCH_TOKENS:])
        return [self._lookup([*recent, *(token for _, token in stem.path)], draft.width) for stem in draft.stems]

    def chains(self, draft: Draft, max_tokens: int, min_prob: float) -> list[Candidate | None]:
        """Return each stem's likeliest continuation of up to `max_tokens` and at least `min_prob`, or None."""
        self._index(draft.tokens)
        recent = list(draft.tokens[-_MAX_MATCH_TOKENS:])
        return [
            self._chain([*recent, *(token for _, token in stem.path)], max_tokens, math.log(min_prob))
            for stem in draft.stems
        ]

    def _chain(self, text: list[TokenId], max_tokens: int, min_logprob: float) -> Candidate | None:
        found = self._lookup(text, 1)
        if not found or found[0].logprob < min_logprob:
            return None
        likeliest = found[0]
        if max_tokens > 1:
            text = [*text[-_MAX_MATCH_TOKENS:], likeliest.token]
            below = self._chain(text, max_tokens - 1, min_logprob - likeliest.logprob)
            if below is not None:
                likeliest = replace(likeliest, children=(below,))
        return likeliest

    def close(self) -> None:
        """Forget the text."""
        self._followers.clear()

    def _index(self, tokens: Sequence[TokenId]) -> None:
        for end in range(self._num_indexed, len(tokens)):
            token = tokens[end]
            for length in range(1, min(_MAX_MATCH_TOKENS, end) + 1):
                followers = self._followers[tuple(tokens[end - length : end])]
                if followers:
                    self._tries[length] += 1
                    self._hits[length] += _likeliest(followers, 1)[0][0] == token
                # The most recent follower wins ties: re-inserting moves it to the end, where `_likeliest` looks first.
                count = followers.pop(token, 0)
                followers[token] = count + 1
        self._num_indexed = len(tokens)

    def _lookup(self, text: list[TokenId], width: int) -> list[Candidate]:
        found: dict[TokenId, float] = {}
        for length in range(min(_MAX_MATCH_TOKENS, len(text)), 0, -1):
            followers = self._followers.get(tuple(text[-length:]))
            if not followers:
                continue
            confidence = self._hits[length] / self._tries[length]
            total = sum(followers.values())
            for token, count in _likeliest(followers, width):
                found.setdefault(token, confidence * count / total)
        ranked = sorted(found.items(), key=lambda item: -item[1])[:width]
        mass = max(1.0, sum(found.values()))
        return [Candidate(token=token, logprob=math.log(prob / mass), source=_NAME) for token, prob in ranked]


def _likeliest(followers: Counter[TokenId], width: int) -> list[tuple[TokenId, int]]:
    newest_first = list(followers.items())[::-1]
    return sorted(newest_first, key=lambda item: -item[1])[:width]

"""Supplies a request's target tokens and candidates, recorded from a real pair or drawn from a few parameters.

Positions are absolute; `pick(p)` is the target's token after position p. A node off the target's text can never be
committed, and nothing was recorded below it. But such nodes compete for places in the tree. So a recorded answer gives
their children the probabilities of another position, and made-up tokens.
"""

import math
import random
import zlib
from dataclasses import dataclass
from typing import Protocol

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.sim.agreement import RecordedText
from dsd_p2p.types import TokenId

_EASY, _HARD = 0.95, 0.5
"""How often the drafter is right in easy and in hard passages."""

_NEXT_RANK = 0.35
"""How often a further candidate is right if all before it were wrong; about what `dsd sim record` finds."""


class Answer(Protocol):
    """The text of one request, with the drafter's candidates."""

    def pick(self, position: int) -> TokenId:
        """Return the target's token after `position`."""
        ...

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return each stem's children, likeliest first; if `draft.levels > 1`, the first child has children too."""
        ...


class _AnswerBase:
    def pick(self, position: int) -> TokenId:
        raise NotImplementedError

    def _children(self, end: int, *, is_on_path: bool, salt: int, width: int) -> list[Candidate]:
        """Return the children of a node at position `end`. salt: differs for each path off the text."""
        raise NotImplementedError

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        start = len(draft.tokens) - 1
        expanded = []
        for stem in draft.stems:
            is_on_path, salt = True, start
            for offset, (_, token) in enumerate(stem.path):
                if is_on_path and token != self.pick(start + offset):
                    is_on_path = False
                if not is_on_path:
                    salt = _stray(token, salt)
            expanded.append(
                self._levels(start + len(stem.path), draft.levels, draft.width, is_on_path=is_on_path, salt=salt)
            )
        return expanded

    def _levels(self, end: int, levels: int, width: int, *, is_on_path: bool, salt: int) -> list[Candidate]:
        children = self._children(end, is_on_path=is_on_path, salt=salt, width=width)
        if levels > 1 and children:
            first = children[0]
            follows = is_on_path and first.token == self.pick(end)
            below_salt = salt if follows else _stray(first.token, salt)
            below = self._levels(end + 1, levels - 1, width, is_on_path=follows, salt=below_salt)
            children[0] = Candidate(
                token=first.token, logprob=first.logprob, children=tuple(below), is_complete=bool(below)
            )
        return children


def _stray(token: TokenId, salt: int) -> int:
    """Return the salt of the path that goes on with `token` off the text; each such path has its own."""
    return zlib.crc32(token.to_bytes(8, "little"), salt)


class RecordedAnswer(_AnswerBase):
    """A recorded text, repeated if it is too short. num_prompt_tokens: length of the prompt before it."""

    def __init__(self, text: RecordedText, num_prompt_tokens: int, vocab_size: int) -> None:
        self._text = text
        self._first = num_prompt_tokens - 1
        self._vocab_size = vocab_size

    def pick(self, position: int) -> TokenId:
        """Return the recorded token."""
        tokens = self._text.tokens
        return tokens[(position - self._first) % len(tokens)]

    def _children(self, end: int, *, is_on_path: bool, salt: int, width: int) -> list[Candidate]:
        text = self._text
        if is_on_path:
            at = (end - self._first) % len(text.tokens)
            return [
                Candidate(token=token, logprob=-value / 100)
                for token, value in zip(text.draft_tokens[at][:width], text.draft_centinats[at][:width], strict=True)
            ]
        at, size = salt % len(text.tokens), self._vocab_size
        return [
            Candidate(token=(salt + rank) % size, logprob=-value / 100)
            for rank, value in enumerate(text.draft_centinats[at][:width])
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementModel:
    """How often the drafter is right.

    rate: share of the tokens that are the drafter's first candidate.
    persistence: how likely the next token belongs to the same passage; otherwise a new one begins, easy or hard.
    num_candidates: how many candidates the drafter proposes; 1 is enough for chains.
    """

    rate: float
    persistence: float = 0.5
    num_candidates: int = 4


class ParametricAnswer(_AnswerBase):
    """A text with easy and hard passages; the drafter is well calibrated.

    The candidates after position p are `16 p` (the target's token), `16 p + 1`, ...
    """

    _SPACING = 16

    def __init__(self, agreement: AgreementModel, seed: int) -> None:
        self._agreement = agreement
        self._rng = random.Random(seed)  # noqa: S311 - a simulation
        self._share_easy = min(1.0, max(0.0, (agreement.rate - _HARD) / (_EASY - _HARD)))
        self._is_easy = self._rng.random() < self._share_easy
        self._first = -1
        self._rates: list[float] = []
        self._ranks: list[int] = []

    def pick(self, position: int) -> TokenId:
        """Return the target's token."""
        return position * self._SPACING

    def _known(self, end: int) -> int:
        """Return a position's index. Positions are drawn in order, so the text does not depend on the call order."""
        if self._first < 0:
            self._first = end
        agreement, rng = self._agreement, self._rng
        while len(self._ranks) <= end - self._first:
            if rng.random() > agreement.persistence:
                self._is_easy = rng.random() < self._share_easy
            rate = _EASY if self._is_easy else min(_HARD, agreement.rate)
            if agreement.rate > _EASY:
                rate = agreement.rate
            rank = 0 if rng.random() < rate else 1
            while rank and rank < self._SPACING and rng.random() >= _NEXT_RANK:
                rank += 1
            self._rates.append(rate)
            self._ranks.append(rank)
        return end - self._first

    def _children(self, end: int, *, is_on_path: bool, salt: int, width: int) -> list[Candidate]:
        at = self._known(end)
        rate, rank = self._rates[at], self._ranks[at]
        first = end * self._SPACING
        count = min(width, self._agreement.num_candidates)
        # Wrong candidates are 1, 2, ... above the target's token.
        tokens = [first + 1 + index for index in range(count)]
        if is_on_path and rank < count:
            tokens[rank] = first
        children = [Candidate(token=tokens[0], logprob=math.log(min(rate, 0.999)))]
        left = 1 - rate
        for token in tokens[1:]:
            children.append(Candidate(token=token, logprob=math.log(max(1e-6, left * _NEXT_RANK))))
            left *= 1 - _NEXT_RANK
        return children

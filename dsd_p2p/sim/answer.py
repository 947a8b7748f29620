"""What target and drafter say in one request: recorded from a real pair, or drawn from a few parameters.

Positions are absolute; `pick(p)` is the target's token after position p. Off the target's text nothing was recorded, and nothing
can be committed there; but such nodes compete for places in the tree, so they get the probabilities of another position and tokens
of their own.
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
"""AgreementModel where the drafter is sure of itself, and where it is not."""

_NEXT_RANK = 0.35
"""How often a further candidate is right where all before it were wrong: about what `dsd sim record` finds."""


class Answer(Protocol):
    """One request's text."""

    def pick(self, position: int) -> TokenId:
        """Return the target's token after `position`."""
        ...

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return each stem's children, likeliest first; for `draft.levels` above 1 what follows the first of them too."""
        ...


class _AnswerBase:
    def pick(self, position: int) -> TokenId:
        raise NotImplementedError

    def _children(self, end: int, *, is_on_path: bool, salt: int, width: int) -> list[Candidate]:
        """The children of a node at position `end`."""
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
    """The salt one token further off the path: a different one for each path."""
    return zlib.crc32(token.to_bytes(8, "little"), salt)


class RecordedAnswer(_AnswerBase):
    """A text of a trace, from its start again when it is too short. num_prompt_tokens: the answer begins after them."""

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

    rate: share of the tokens that are its first candidate. num_candidates: it names; 1 is enough for chains.
    persistence: how likely an easy or hard passage goes on at the next token.
    """

    rate: float
    persistence: float = 0.5
    num_candidates: int = 4


class ParametricAnswer(_AnswerBase):
    """A text whose easy and hard passages take turns; the drafter's confidence is what it deserves.

    The tokens after position p are `16 p` (the target's), `16 p + 1`, ...
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
        """Index of a position; positions are drawn in order, so that the text does not depend on what is asked first."""
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
        # Others than the target's token are 1, 2, ... above it.
        tokens = [first + 1 + index for index in range(count)]
        if is_on_path and rank < count:
            tokens[rank] = first
        children = [Candidate(token=tokens[0], logprob=math.log(min(rate, 0.999)))]
        left = 1 - rate
        for token in tokens[1:]:
            children.append(Candidate(token=token, logprob=math.log(max(1e-6, left * _NEXT_RANK))))
            left *= 1 - _NEXT_RANK
        return children

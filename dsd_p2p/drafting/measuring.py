"""Measures drafters: seconds a step, and how often they would have had the next token of a text."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dsd_p2p.drafting.base import Drafter
from dsd_p2p.session.effects import Draft, Stem
from dsd_p2p.types import TokenId

_WIDTH = 2
"""Candidates that count as a level of the tree: most trees keep two children of a node."""

_MAX_TOKENS = 64
"""Tokens of an answer to measure on: more would hold up the next answer."""

_REPEATS = 5
_PRIOR_TOKENS = 25.0
"""Measured tokens that weigh as much as the prior: a short first answer condemns no drafter."""


@dataclass(slots=True, kw_only=True)
class Coverage:
    """How often a drafter's first candidates hold the next token. prior: the rate before anything is measured."""

    prior: float
    num_hits: int = 0
    num_tokens: int = 0

    @property
    def rate(self) -> float:
        """The expected rate."""
        return (self.num_hits + _PRIOR_TOKENS * self.prior) / (self.num_tokens + _PRIOR_TOKENS)

    def add(self, hits: Sequence[bool]) -> None:
        """Add one outcome for each token."""
        self.num_hits += sum(hits)
        self.num_tokens += len(hits)


def coverage_of(drafter: Drafter, tokens: Sequence[TokenId], num_prompt: int) -> list[bool]:
    """Return for each token of an answer, at most 64, whether the drafter had it among its first two candidates.

    tokens: prompt and answer.

    Raises:
        CapacityError: the drafter has no memory for the text.
    """
    end = min(len(tokens), num_prompt + _MAX_TOKENS)
    session = drafter.open(end)
    try:
        hits = []
        starts = range(num_prompt, end) if drafter.is_instant else (num_prompt,)
        for start in starts:
            last = start + 1 if drafter.is_instant else end
            # One draft asks below each prefix of the answer; a model computes it in one pass.
            path = [(position, tokens[position]) for position in range(start, last - 1)]
            stems = [
                Stem(key=path[length - 1][0] if length else start - 1, path=tuple(path[:length]))
                for length in range(len(path) + 1)
            ]
            draft = Draft(tokens=tokens[:start], keys=range(start), stems=tuple(stems), width=_WIDTH)
            answers = session.expand(draft)
            hits += [
                any(candidate.token == token for candidate in answer)
                for answer, token in zip(answers, tokens[start:last], strict=True)
            ]
        return hits
    finally:
        session.close()


def step_s_of(drafter: Drafter) -> float:
    """Return the median seconds of one step over one stem; 0 for a drafter that needs no measurable time."""
    if drafter.is_instant:
        return 0.0
    session = drafter.open(_REPEATS + 2)
    try:
        samples = []
        for length in range(1, _REPEATS + 2):
            stem = Stem(key=length - 1, path=())
            started_s = time.perf_counter()
            session.expand(Draft(tokens=[0] * length, keys=range(length), stems=(stem,), width=_WIDTH))
            samples.append(time.perf_counter() - started_s)
        return statistics.median(samples[1:])
    finally:
        session.close()

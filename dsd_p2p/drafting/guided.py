"""Keeps drafts within a request's constraint: guesses that the target cannot pick are removed, forced tokens are added.

A forced token needs no drafter: where the constraint leaves one way to go on, its spelling becomes a chain of nodes. The
target may spell the same text with other tokens, so even these are guesses.
"""

import logging
import math
from collections.abc import Sequence

from msgspec.structs import replace

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import TokenId
from dsd_p2p.verification.grammar import Grammar, Matcher

logger = logging.getLogger(__name__)

_NAME = "grammar"
_FORCED_PROB = 0.9
"""How often the target spells forced text as the constraint's tokenizer does."""

_MAX_FORCED = 16
_LEAST_LEFT = 0.02
"""What is left to the allowed guesses counts as at least this much, because drafters do not tell all their guesses."""


class Guide:
    """The constraint of one request, as its coordinator follows it. num_prompt: tokens before the answer.

    Not thread-safe: calls must not overlap.
    """

    def __init__(self, grammar: Grammar, num_prompt: int) -> None:
        self._grammar = grammar
        self._matcher: Matcher | None = None
        self._num_prompt = num_prompt
        self._num_read = 0
        self._is_broken = False

    def guided(self, draft: Draft, found: Sequence[Sequence[Candidate]]) -> list[list[Candidate]]:
        """Return the candidates of each stem that the constraint allows, with forced tokens first."""
        if self._is_broken:
            return [list(each) for each in found]
        try:
            root = self._root(draft.tokens)
            return [
                self._below(root, [token for _, token in stem.path], list(candidates), draft.width)
                for stem, candidates in zip(draft.stems, found, strict=True)
            ]
        except Exception:  # a failed guess must not cost the answer; the tail says what is wrong with a constraint
            logger.info("drafts are not guided any more", exc_info=True)
            self._is_broken = True
            return [list(each) for each in found]

    def _root(self, tokens: Sequence[TokenId]) -> Matcher:
        if self._matcher is None:
            self._matcher = self._grammar.start()
        for token in tokens[self._num_prompt + self._num_read :]:
            self._matcher.advance(token)
            self._num_read += 1
        return self._matcher

    def _below(
        self, root: Matcher, path: Sequence[TokenId], candidates: list[Candidate], width: int
    ) -> list[Candidate]:
        matcher = root.copy()
        for token in path:
            if not matcher.allows(token):
                return []
            matcher.advance(token)
        if matcher.is_over:
            return candidates
        kept = _allowed(matcher, candidates)
        forced = matcher.forced()[:_MAX_FORCED]
        if not forced:
            return kept
        chain = _chain(forced)
        others = [each for each in kept if each.token != forced[0]]
        if len(forced) == 1:
            # The drafter may see further.
            same = [each for each in kept if each.token == forced[0]]
            chain = replace(chain, children=same[0].children if same else ())
        scale = math.log(1 - _FORCED_PROB)
        return [chain, *(replace(each, logprob=each.logprob + scale) for each in others)][:width]


def _allowed(matcher: Matcher, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the allowed candidates, whose probabilities grow by those of the others."""
    kept = []
    lost = 0.0
    for each in candidates:
        if not matcher.allows(each.token):
            lost += math.exp(each.logprob)
            continue
        below: tuple[Candidate, ...] = ()
        if each.children:
            onward = matcher.copy()
            onward.advance(each.token)
            below = tuple(each.children if onward.is_over else _allowed(onward, each.children))
        kept.append(replace(each, children=below))
    gain = -math.log(min(1.0, max(1.0 - lost, _LEAST_LEFT)))
    return [replace(each, logprob=min(0.0, each.logprob + gain)) for each in kept]


def _chain(tokens: Sequence[TokenId]) -> Candidate:
    below = (_chain(tokens[1:]),) if len(tokens) > 1 else ()
    return Candidate(token=tokens[0], logprob=math.log(_FORCED_PROB), source=_NAME, children=below)

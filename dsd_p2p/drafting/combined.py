"""Combines a drafting model and prompt lookup in one draft tree.

Lookup costs nothing, sees several tokens ahead, and is right where the text repeats itself. A token that both propose
becomes one node. Where they disagree, lookup's token is weighted by how often lookup was right in earlier
disagreements. Cf. suffix decoding (Oliaro et al. 2024, arXiv:2411.04975), which also combines lookup with a model.
"""

import math
from dataclasses import dataclass

from dsd_p2p.drafting.base import Drafter, DraftSession
from dsd_p2p.drafting.ngram import NgramDrafter, NgramSession
from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.types import GREEDY, Sampling, TokenId

_MAX_CHAIN_TOKENS = 12
"""Longest chain that prompt lookup adds below one node: repeats that are longer go on with the next draft."""

_MIN_CHAIN_PROB = 0.3
"""A chain ends where its probability falls below this, so that windows carry likely nodes."""

_PRIOR_HITS, _PRIOR_TRIES = 1.0, 5.0
"""Before anything is known, lookup is right once in five times where it contradicts the model."""

_MAX_REMEMBERED = 4096


class CombinedDrafter:
    """Drafts with `model` and with prompt lookup."""

    def __init__(self, model: Drafter) -> None:
        self._model = model
        self._lookup = NgramDrafter()
        self.name = f"{model.name}+{self._lookup.name}"
        self.is_instant = model.is_instant

    def open(self, max_length: int, sampling: Sampling = GREEDY) -> "CombinedSession":
        """Open a session for a request.

        Raises:
            CapacityError: the model has no memory for the request.
        """
        return CombinedSession(self._model.open(max_length, sampling), self._lookup.open(max_length, sampling))


@dataclass(frozen=True, slots=True)
class _Disagreement:
    """The differing proposals after one node: the model's likeliest token and lookup's."""

    model: TokenId
    lookup: TokenId


class CombinedSession:
    """Both drafters at work on one request."""

    def __init__(self, model: DraftSession, lookup: NgramSession) -> None:
        self._model = model
        self._lookup = lookup
        self._disagreements: dict[int, _Disagreement] = {}
        self._num_learned = 0
        self._hits, self._tries = _PRIOR_HITS, _PRIOR_TRIES

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Ask both drafters and merge their candidates; lookup's carry their own continuations."""
        self._learn(draft)
        answers = self._model.expand(draft)
        chains = self._lookup.chains(draft, _MAX_CHAIN_TOKENS, _MIN_CHAIN_PROB)
        merged = []
        for stem, candidates, chain in zip(draft.stems, answers, chains, strict=True):
            if chain is None:
                merged.append(candidates)
                continue
            if candidates and candidates[0].token != chain.token:
                self._disagreements[stem.key] = _Disagreement(candidates[0].token, chain.token)
            merged.append(self._merge(candidates, chain, draft.width))
        return merged

    def close(self) -> None:
        """Close both sessions."""
        self._model.close()
        self._lookup.close()

    def _merge(self, candidates: list[Candidate], chain: Candidate, width: int) -> list[Candidate]:
        chain_prob = math.exp(chain.logprob)
        probs = {candidate.token: math.exp(candidate.logprob) for candidate in candidates}
        if candidates and candidates[0].token == chain.token:
            # Both agree. Their errors are taken to be independent.
            probs[chain.token] = 1 - (1 - probs[chain.token]) * (1 - chain_prob)
        else:
            trust = self._hits / self._tries
            probs = {token: (1 - trust) * prob for token, prob in probs.items()}
            probs[chain.token] = probs.get(chain.token, 0.0) + trust
        mass = max(1.0, sum(probs.values()))
        sources = {candidate.token: candidate.source for candidate in candidates}
        ranked = sorted(probs, key=lambda token: -probs[token])[:width]
        return [
            Candidate(
                token=token,
                logprob=math.log(probs[token] / mass) if probs[token] > 0 else -100.0,
                source=sources.get(token, chain.source),
                children=chain.children if token == chain.token else (),
            )
            for token in ranked
        ]

    def _learn(self, draft: Draft) -> None:
        """Update how often lookup was right where the two disagreed."""
        for index in range(max(1, self._num_learned), len(draft.tokens)):
            seen = self._disagreements.pop(draft.keys[index - 1], None)
            if seen is not None and draft.tokens[index] in (seen.model, seen.lookup):
                self._tries += 1
                self._hits += draft.tokens[index] == seen.lookup
        self._num_learned = len(draft.tokens)
        if len(self._disagreements) > _MAX_REMEMBERED:
            self._disagreements.clear()

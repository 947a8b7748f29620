"""Drafts with a language model whose cache follows the draft tree; a whole level takes one forward pass.

The cache uses the same slot table as a stage's, with the tree's keys as names. Committed nodes join the prefix, nodes
that no longer descend from the root are dropped, and nothing is computed twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import CapacityError
from dsd_p2p.models.open import OpenSpan
from dsd_p2p.session.effects import NUM_CANDIDATES, Candidate, Draft
from dsd_p2p.types import GREEDY, Sampling, TokenId
from dsd_p2p.verification.exact import gumbel_noise, kept_tokens

_DRAFT_SLOTS = 2048
_MAX_SAMPLED = 256
"""How many of the likeliest tokens get noise when the target samples. Tokens below them are hardly ever drawn."""


class ModelDrafter:
    """A drafter that runs a whole model.

    model: all layers of a language model with the target's tokenizer. name: the drafter's name in statistics.
    num_tokens: the size of the target's vocabulary; tokens above are never drafted. Siblings often differ in how many
        unused rows pad their embeddings. 0: the same as the model's.
    """

    is_instant = False

    def __init__(self, model: OpenSpan, name: str, num_tokens: int = 0) -> None:
        self._model = model
        self._num_tokens = min(num_tokens or model.shape.vocab_size, model.shape.vocab_size)
        self.name = name

    def open(self, max_length: int, sampling: Sampling = GREEDY) -> "ModelDraftSession":
        """Open a session for a request.

        Raises:
            CapacityError: the drafter's cache budget is full, or the text may outgrow its context.
        """
        max_positions = self._model.shape.max_positions
        if max_length > max_positions:
            raise CapacityError(
                f"drafter {self.name}: the text may grow to {max_length} tokens, the drafter's limit is {max_positions}; "
                "ask for fewer tokens or choose another drafter with --draft"
            )
        return ModelDraftSession(self._model, max_length, sampling, self.name, self._num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Feed:
    """A token, committed or drafted, that the model has not seen yet."""

    key: int
    token: TokenId
    parent: int | None
    position: int


class ModelDraftSession:
    """The drafting model's cache for one request."""

    def __init__(self, model: OpenSpan, max_length: int, sampling: Sampling, name: str, num_tokens: int) -> None:
        self._model = model
        self._num_tokens = num_tokens
        self._sampling = sampling
        self._name = name
        self._cache = model.new_cache(max_length + _DRAFT_SLOTS)
        self._slots = SlotTable()
        self._children: dict[int, list[Candidate]] = {}

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Run the new tokens of the text and of the stems' paths in one forward pass."""
        self._settle(draft)
        root_key = draft.keys[-1]
        self._children = {
            key: children for key, children in self._children.items() if key == root_key or key in self._slots
        }
        feeds = list(self._missing(draft))
        if feeds:
            self._run(feeds, num_without_children=max(0, len(draft.tokens) - 1 - feeds[0].position))
        return [self._children[stem.key][: draft.width] for stem in draft.stems]

    def close(self) -> None:
        """Free the cache."""
        self._cache.free()

    def _settle(self, draft: Draft) -> None:
        """Add the tokens committed since the last draft to the prefix, as far as the model has seen them."""
        newest = None
        for key in draft.keys[self._slots.prefix_length :]:
            if key not in self._slots:
                break
            newest = key
        is_unseen = self._slots.prefix_length < len(draft.keys) if newest is None else draft.keys[-1] != newest
        edit = self._slots.settle(newest) if newest is not None else None
        if edit is not None:
            self._cache.edit(edit)
        if is_unseen:
            # The text went another way: no drafted node descends from the root.
            edit = self._slots.settle(None)
            if edit is not None:
                self._cache.edit(edit)

    def _missing(self, draft: Draft) -> Iterable[_Feed]:
        fed: set[int] = set()
        parent: int | None = None
        for position in range(self._slots.prefix_length, len(draft.tokens)):
            key = draft.keys[position]
            yield _Feed(key=key, token=draft.tokens[position], parent=parent, position=position)
            fed.add(key)
            parent = key
        for stem in draft.stems:
            above, position = parent, len(draft.tokens)
            for key, token in stem.path:
                if key not in self._slots and key not in fed:
                    yield _Feed(key=key, token=token, parent=above, position=position)
                    fed.add(key)
                above, position = key, position + 1

    def _run(self, feeds: list[_Feed], num_without_children: int) -> None:
        forward = self._slots.append(
            [feed.key for feed in feeds], [feed.parent for feed in feeds], [feed.position for feed in feeds]
        )
        rows = range(num_without_children, len(feeds))
        # A token that the drafter lacks is one that the target's tokenizer does not use either.
        tokens = [min(feed.token, self._num_tokens - 1) for feed in feeds]
        views = self._model.views(self._cache, forward, tokens, rows)
        logits = torch.stack([view.row for view in views])[:, : self._num_tokens].float()
        if self._sampling.is_greedy:
            best = torch.log_softmax(logits, dim=-1).topk(min(NUM_CANDIDATES, logits.shape[-1]))
            ranked = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        else:
            positions = [feeds[row].position + 1 for row in rows]
            ranked = [self._sampled(row, position) for row, position in zip(logits, positions, strict=True)]
        for row, (children, values) in zip(rows, ranked, strict=True):
            self._children[feeds[row].key] = [
                Candidate(token=token, logprob=logprob, source=self._name)
                for token, logprob in zip(children, values, strict=True)
            ]

    def _sampled(self, logits: torch.Tensor, position: int) -> tuple[list[TokenId], list[float]]:
        """Return candidates drawn with the target's own noise: where the two models agree, so do their samples."""
        sampling = self._sampling
        best = logits.topk(min(_MAX_SAMPLED, logits.shape[-1]))
        tokens, scores = best.indices.cpu().numpy(), best.values.double().cpu().numpy() / sampling.temperature
        kept = kept_tokens(scores, sampling.top_k, sampling.top_p)
        tokens, scores = tokens[kept], scores[kept]
        noisy = scores + gumbel_noise(sampling.seed, position, logits.shape[-1], tokens)
        logprobs = noisy - np.logaddexp.reduce(noisy)
        order = np.argsort(-logprobs, kind="stable")[:NUM_CANDIDATES]
        return tokens[order].tolist(), logprobs[order].tolist()

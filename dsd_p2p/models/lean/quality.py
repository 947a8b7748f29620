"""Judges an int8 model by the float32 one: the same next token, the difference of the distributions, and perplexity."""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import ModelError
from dsd_p2p.models.lean.span import LeanSpan
from dsd_p2p.models.span import SpanModel
from dsd_p2p.types import TokenId


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """How near an int8 model is to the float32 one.

    agreement: the share of positions with the same likeliest token. kl: the mean divergence, in nats.
    perplexity_growth: of the texts, as a share of the float32 model's.
    """

    agreement: float
    kl: float
    perplexity_growth: float
    num_positions: int


@torch.inference_mode()
def log_probabilities(model: SpanModel | LeanSpan, tokens: Sequence[TokenId]) -> Tensor:
    """Return the log probabilities after each token, `[n, V]`."""
    cache = model.new_cache(len(tokens))
    try:
        views = model.views(cache, SlotTable().chain(len(tokens)), list(tokens), range(len(tokens)))
        return torch.log_softmax(torch.from_numpy(np.stack([view.logits() for view in views])), dim=-1)
    finally:
        cache.free()


@torch.inference_mode()
def judge(model: LeanSpan, texts: Sequence[Sequence[TokenId]], expected: Sequence[Tensor]) -> Quality:
    """Compare a whole int8 model with what the float32 one says of the same texts (`log_probabilities`).

    Raises:
        ModelError: there is no text of two tokens.
    """
    same: list[bool] = []
    divergence: list[float] = []
    growth: list[float] = []
    for tokens, theirs in zip(texts, expected, strict=True):
        ours = log_probabilities(model, tokens)
        same += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
        divergence += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
        following = torch.tensor(list(tokens[1:]), dtype=torch.int64)[:, None]
        growth += (theirs[:-1].gather(1, following) - ours[:-1].gather(1, following)).flatten().tolist()
    if not growth:
        raise ModelError("no text to judge by: each needs at least two tokens")
    return Quality(
        agreement=float(np.mean(same)),
        kl=float(np.mean(divergence)),
        perplexity_growth=float(np.exp(np.mean(growth)) - 1),
        num_positions=len(same),
    )

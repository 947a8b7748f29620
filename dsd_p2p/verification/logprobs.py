"""Computes the log probabilities that the target gives to its own tokens."""

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import TokenId, TokenLogprobs


def token_logprobs(logits: NDArray[np.float32], token: TokenId, num_top: int) -> TokenLogprobs:
    """Return the log probabilities of `token` and the `num_top` likeliest tokens, at temperature 1. logits: `[V]`."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    num_top = min(num_top, len(scores))
    top = np.argpartition(-scores, num_top - 1)[:num_top] if num_top else np.empty(0, np.int64)
    top = top[np.argsort(-scores[top], kind="stable")]
    return TokenLogprobs(
        millinats=_millinats(scores[token]),
        top=tuple(top.tolist()),
        top_millinats=tuple(_millinats(scores[each]) for each in top),
    )


def _millinats(logprob: float) -> int:
    return min(1 << 30, max(0, round(-1000 * float(logprob))))

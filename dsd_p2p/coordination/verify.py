"""Judges a finished answer: computes it in one pass and says whether its tokens are the model's own.

Anybody with the weights can do this, without a word from the peers that wrote it, after VeriLLM (arXiv:2509.24257) and
Token-DiFR (arXiv:2511.20621). The text is a function of prompt, settings and seed, so each token is compared with the one
that the model picks after the same text. Machines round differently, so a token may miss the pick by a hair. How wide
a hair is, is measured: the text's beginning is computed twice, in pieces of different sizes.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from dsd_p2p.coordination.tolerance import first_wrong_pick, tolerance_of
from dsd_p2p.errors import ConfigError
from dsd_p2p.stage.recompute import NUM_AGAIN, RecomputePass
from dsd_p2p.stage.span_model import SpanModel
from dsd_p2p.types import ModelKey, PeerId, Span, TextRequest, TokenId
from dsd_p2p.wire.attest import PROBES
from dsd_p2p.wire.messages import MAX_RECOMPUTED, Recompute, Recomputed

_MAX_ROWS = 128
_DOUBT = 1e-3


class Judgement(msgspec.Struct, kw_only=True):
    """What an answer's tokens say.

    num_others: tokens that are not the model's own pick. worst_gap, mean_gap: by how much the logits would have to be off
    for them to be. noise: the size of honest rounding, in logits. probability: that honest rounding causes a gap as wide
    as the worst one anywhere in the text; 0 if a token cannot be picked at all.
    """

    is_honest: bool
    probability: float
    num_tokens: int
    num_others: int
    first_other: int | None
    worst_gap: float
    mean_gap: float
    noise: float


def judge_answer(
    model: SpanModel,
    key: ModelKey,
    num_layers: int,
    text: TextRequest,
    prompt: Sequence[TokenId],
    tokens: Sequence[TokenId],
) -> Judgement:
    """Judge the answer `tokens` to `prompt`. model: all layers of the model that is said to have written it.

    Raises:
        ConfigError: the answer is empty or too long, or was written in relaxed mode.
        DsdError: a token is outside the vocabulary, or the pass failed.
    """
    if text.relaxation is not None:
        raise ConfigError("a relaxed answer is not the model's own text: only exact answers can be verified")
    if not tokens or len(prompt) + len(tokens) > MAX_RECOMPUTED:
        raise ConfigError(f"expected 1 to {MAX_RECOMPUTED} tokens with the prompt, got {len(tokens)} and {len(prompt)}")
    whole = (*prompt, *tokens)
    asked = Recompute(
        request=bytes(8),
        span=Span(0, num_layers),
        model=key,
        tokens=whole[:-1],
        text=text,
        num_prompt=len(prompt),
        following=whole[-1],
    )
    message, rows = _compute(model, asked)
    gaps = np.array(message.gaps[len(prompt) - 1 :], np.float64) / 1e3
    logits = np.frombuffer(rows, "<f4").reshape(-1, PROBES)[len(prompt) - 1 :]
    size = float(np.sqrt(np.square(logits, dtype=np.float64).mean()))
    tolerance, others = tolerance_of(key.weights), np.flatnonzero(gaps > 0)
    noise = max(message.noise / 1e6, tolerance.floor) * size
    worst = float(gaps.max())
    # Each of the two logits is off by `noise`, and any position may show the widest gap.
    probability = 1.0 if not len(others) else min(1.0, len(gaps) * math.erfc(worst / (2 * noise)))
    is_close = first_wrong_pick(message.gaps[len(prompt) - 1 :], tolerance) is None
    return Judgement(
        is_honest=is_close and (probability > _DOUBT or worst <= tolerance.mean_gap),
        probability=probability,
        num_tokens=len(tokens),
        num_others=len(others),
        first_other=int(others[0]) if len(others) else None,
        worst_gap=worst,
        mean_gap=float(gaps.mean()),
        noise=noise,
    )


def _compute(model: SpanModel, asked: Recompute) -> tuple[Recomputed, bytes]:
    caches = [model.new_cache(len(asked.tokens)), model.new_cache(NUM_AGAIN)]
    try:
        work = RecomputePass(model, caches, PeerId(""), asked, b"")
        work.begin()
        while work.num_left:
            piece = work.piece(_MAX_ROWS)
            work.take(piece, model.run([piece])[0])
    finally:
        for cache in caches:
            cache.free()
    return work.result()

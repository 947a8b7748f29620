"""Finds the thresholds that relax most tokens for a given loss of the target's log-likelihood."""

import itertools
import sys
import time
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import ConfigError
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import GREEDY, Relaxation
from dsd_p2p.verification.exact import ExactVerifier
from dsd_p2p.verification.importance import Signals, is_decisive, signals_of
from node.config.relaxation import Thresholds
from node.lab.config import CalibrateConfig
from node.lab.quality.pair_writer import Disagreement, PairWriter
from node.lab.quality.prompts import load_problems, spread

_TAUS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
_CE_RATIOS = (1.5, 2.0, 4.0, 8.0)
_PROB_GAPS = (0.1, 0.2, 0.3, 0.5)
_NORM_MATCHES = (0.4, 0.6, 0.8)
_OVERSHOOTS = (1.5, 2.0, 3.0, 5.0)


@dataclass(frozen=True, slots=True)
class _Position:
    """A disagreement in the form that the search needs. The strict token is at `strict_row` of the arrays."""

    target_logprobs: NDArray[np.float64]
    draft_logprobs: NDArray[np.float64]
    strict_row: int
    signals: tuple[Signals, ...]


def find_thresholds(config: CalibrateConfig, progress: Progress) -> Thresholds:
    """Return the thresholds with the greatest share of relaxed tokens whose mean loss stays within `config.budget`.

    Raises:
        ConfigError: the prompt category is unknown, or no thresholds stay within the budget.
        ModelError: a model cannot be loaded.
    """
    codec = TextCodec(find_model(config.model, progress).folder)
    problems = spread(load_problems(config.prompts, progress), config.num_prompts)
    prompts = [codec.encode(problem.prompt, is_raw=False) for problem in problems]
    writer = PairWriter(config.model, config.draft, dtype=config.dtype, device=config.device, progress=progress)
    positions: list[_Position] = []

    def observe(disagreement: Disagreement) -> None:
        positions.append(position_of(disagreement))

    num_tokens = 0
    for start in range(0, len(prompts), config.batch):
        batch = prompts[start : start + config.batch]
        texts = writer.write(batch, config.max_tokens, codec.stop_tokens, ExactVerifier(GREEDY), observe)
        num_tokens += sum(len(text.tokens) for text in texts)
        progress.step("write with the exact pair", start + len(batch), len(prompts))
    best: tuple[float, float, Relaxation] | None = None
    for relaxation in _candidates():
        share, loss = outcome(positions, num_tokens, relaxation)
        if loss <= config.budget and (best is None or share > best[0]):
            best = (share, loss, relaxation)
    if best is None or best[0] == 0:
        raise ConfigError(f"no thresholds relax anything within {config.budget:g} nats a token: raise --budget")
    share, loss, relaxation = best
    return Thresholds(
        relaxation=msgspec.structs.replace(relaxation, budget=config.budget),
        target=config.model,
        drafter=config.draft,
        dtype=config.dtype,
        prompts=f"{config.prompts}, {len(prompts)} evenly spaced",
        num_positions=num_tokens,
        budget_nats=config.budget,
        loss_nats=loss,
        relaxed_share=share,
        command=" ".join(["dsd", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
    )


def _candidates() -> list[Relaxation]:
    return [
        Relaxation(tau=tau, max_ce_ratio=ratio, max_prob_gap=gap, min_norm_match=match, max_overshoot=overshoot)
        for tau, ratio, gap, match, overshoot in itertools.product(
            _TAUS, _CE_RATIOS, _PROB_GAPS, _NORM_MATCHES, _OVERSHOOTS
        )
    ]


def position_of(disagreement: Disagreement) -> _Position:
    """Return the parts of a disagreement that `outcome` needs."""
    scores = disagreement.target_row.double().numpy()
    logprobs = scores - np.logaddexp.reduce(scores)
    opinion = disagreement.opinion.including(disagreement.strict)
    return _Position(
        target_logprobs=logprobs[opinion.tokens],
        draft_logprobs=opinion.logprobs,
        strict_row=int(np.flatnonzero(opinion.tokens == disagreement.strict)[0]),
        signals=tuple(signals_of(logprobs, opinion, int(token)) for token in opinion.tokens),
    )


def outcome(positions: list[_Position], num_tokens: int, relaxation: Relaxation) -> tuple[float, float]:
    """Return the share of relaxed tokens and the mean loss in nats a token.

    This is the rule of `dsd_p2p.verification.adaptive`, restricted to the candidates and the strict token: a search
    judges each position about a thousand times.
    """
    num_relaxed, loss = 0, 0.0
    max_log_overshoot = np.log(relaxation.max_overshoot)
    for position in positions:
        blend = (1 - relaxation.tau) * position.target_logprobs + relaxation.tau * position.draft_logprobs
        row = int(np.argmax(blend))
        if blend[position.strict_row] >= blend[row] or is_decisive(position.signals[row], relaxation):
            continue
        if position.draft_logprobs[row] - position.target_logprobs[row] > max_log_overshoot:
            continue
        num_relaxed += 1
        loss += float(position.target_logprobs[position.strict_row] - position.target_logprobs[row])
    return num_relaxed / num_tokens, loss / num_tokens

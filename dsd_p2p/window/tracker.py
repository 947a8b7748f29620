"""Turns the events of requests into the observations that a policy decides from."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dsd_p2p.types import StageCost
from dsd_p2p.window.base import CostLine, Decision, MeasuredRate, Mode, Observation

_DECAY = 0.95
"""Weight of the past at each new sample: about the last 20 windows count."""

_PRIOR_HAZARDS = (0.70, 0.40, 0.30, 0.25, *(0.20,) * 12)
"""Before anything is measured: how often each candidate is right where those before it were not."""

_LINK_SLACK_S = 0.01
"""How much more than twice the usual a traversal's links may take before the rest is left out."""

_RATE_DECAY = 0.97
"""Weight of a mode's past after one more token: about the last 32 count."""

_OUTCOME_DECAY = 0.985
"""Weight of the past at each committed token: about the last 70 count, so that a new text is soon known."""

_PRIOR_WEIGHT, _FIRST_PRIOR_WEIGHT = 2.0, 6.0
"""Tokens after which measurement and prior count the same; at first more, so that two misses in a row condemn no drafter."""

_USUAL_SLOPE = 0.03
"""Cost of one more node as a share of a pass's fixed part: 3 to 4 % on a CPU (docs/benchmarks.md), less on a GPU."""

_FIRST_SHARPENING, _LEAST_SHARPENING, _MOST_SHARPENING = 1.3, 0.5, 3.0
"""The exponent at first, and its bounds. Above 1, because a greedy target takes the likeliest token more often than sampling would.
The bounds keep a run of odd outcomes from making the drafter look certain (3) or useless (0.5)."""

_SHARPENING_STEP = 0.02
"""Greatest change of the exponent for one outcome: from the first value to a bound takes at least 40 outcomes."""

_HINT_WEIGHT, _MAX_OUTCOMES_BEFORE_HINTS = 0.25, 16
"""Weight of what another coordinator measured, and the own outcomes after which it is not taken any more."""

_REMEMBERED_OUTCOMES = 1 / (1 - _OUTCOME_DECAY)
"""The most that tries can add up to."""

_KEPT_WEIGHT, _KEPT_VERDICTS = 0.5, 10
"""What an earlier tracker left counts half, and its links as much as ten verdicts: about ten windows outweigh it."""

_SLOPE_PRIOR = 64.0
"""Squared nodes; about twenty passes of which every other one is four nodes larger weigh the same as the prior."""


Sums = tuple[float, float, float, float, float]
"""The weighted sums of a `LineFit`: weight, n, n squared, seconds, n times seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How often a drafter was right for another coordinator.

    confidence: the probability that it gave its first candidates. exponent: what its probabilities have to be raised to.
    hits, tries: of each rank of its candidates, fading.
    """

    confidence: float
    exponent: float
    hits: Sequence[float]
    tries: Sequence[float]


class KeptRate(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of one kind of window: the tokens and seconds that still count, and its tokens in all."""

    decision: Decision
    tokens: float
    seconds: float
    num_tokens: int


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What a `Tracker` leaves to the next one of its route and drafter. The fields are the tracker's."""

    stages: tuple[Sums, ...]
    links_s: float
    queue_s: float
    num_sharing: float
    confidence: float
    draft: Sums
    hits_by_rank: tuple[float, ...]
    tries_by_rank: tuple[float, ...]
    exponent: float
    num_outcomes: int
    rates: tuple[KeptRate, ...]


class LineFit:
    """A least-squares fit of `fixed + slope * n` with fading samples and a prior on the slope, which is never negative.

    Passes of one size say nothing about the slope, and on a shared machine their times vary by more than a few nodes
    cost. Without a prior, a stage was once rated at ten times its cost per node, and the rating outlived its cause.
    """

    __slots__ = ("_n", "_nn", "_ny", "_weight", "_y")

    def __init__(self) -> None:
        self._weight = self._n = self._nn = self._y = self._ny = 0.0

    def add(self, num_nodes: int, seconds: float) -> None:
        """Add one pass over `num_nodes`."""
        self._weight = self._weight * _DECAY + 1
        self._n = self._n * _DECAY + num_nodes
        self._nn = self._nn * _DECAY + num_nodes * num_nodes
        self._y = self._y * _DECAY + seconds
        self._ny = self._ny * _DECAY + num_nodes * seconds

    def sums(self) -> Sums:
        """Return what the fit consists of, to be kept."""
        return self._weight, self._n, self._nn, self._y, self._ny

    def begin(self, sums: Sums) -> None:
        """Begin with kept sums, at half their weight, so that new samples soon correct them."""
        self._weight, self._n, self._nn, self._y, self._ny = (_KEPT_WEIGHT * each for each in sums)

    def line(self) -> CostLine:
        """Return the fit; all zeros before the first sample."""
        if not self._weight:
            return CostLine(fixed_s=0.0, per_node_s=0.0)
        mean_n, mean_s = self._n / self._weight, self._y / self._weight
        deviation, covariation = self._nn - self._n * mean_n, self._ny - self._n * mean_s
        usual_slope = _USUAL_SLOPE * mean_s / (1 + _USUAL_SLOPE * mean_n)
        slope = max(0.0, (covariation + _SLOPE_PRIOR * usual_slope) / (deviation + _SLOPE_PRIOR))
        return CostLine(fixed_s=max(0.0, mean_s - slope * mean_n), per_node_s=slope)


class Sharpening:
    """Corrects a drafter's probabilities to `p^s / Σ p^s`, with s fitted to the tokens that the target then wrote.

    A drafter's probabilities are made for sampling; a greedy target takes its likeliest token more often than they say.
    The exponent follows the likelihood of the outcomes by stochastic gradient ascent. All tokens that are no candidates
    count as one more candidate.
    """

    def __init__(self) -> None:
        self.exponent = _FIRST_SHARPENING

    def apply(self, logprobs: Sequence[float]) -> list[float]:
        """Return the sharpened log probabilities of one node's candidates."""
        exponent, exp = self.exponent, math.exp
        log_mass = math.log(sum([exp(exponent * value) for value in logprobs]) + exp(exponent * _rest(logprobs)))
        return [exponent * value - log_mass for value in logprobs]

    def learn(self, rank: int | None, logprobs: Sequence[float]) -> None:
        """Learn from one outcome: the rank of the candidate that was committed, or None."""
        exponent, exp = self.exponent, math.exp
        values = (*logprobs, _rest(logprobs))
        weights = [exp(exponent * value) for value in values]
        expected = sum(map(operator.mul, weights, values)) / sum(weights)
        # Bounded, because one great surprise must not undo a hundred confirmations.
        step = max(-1.0, min(1.0, values[-1 if rank is None else rank] - expected))
        moved = self.exponent + _SHARPENING_STEP * step
        self.exponent = max(_LEAST_SHARPENING, min(_MOST_SHARPENING, moved))


def _rest(logprobs: Sequence[float]) -> float:
    return math.log(max(1e-4, 1 - sum(map(math.exp, logprobs))))


class _Rate:
    """A rate in tokens per second, in which the past fades with each new token."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision
        self._tokens = self._seconds = 0.0
        self._num_tokens = 0
        self._last_total = 0

    def add(self, num_tokens: int, seconds: float, total_tokens: int) -> None:
        fading = _RATE_DECAY**num_tokens
        self._tokens = self._tokens * fading + num_tokens
        self._seconds = self._seconds * fading + seconds
        self._num_tokens += num_tokens
        self._last_total = total_tokens

    def kept(self) -> KeptRate:
        return KeptRate(self._decision, self._tokens, self._seconds, self._num_tokens)

    def begin(self, kept: KeptRate) -> None:
        self._tokens, self._seconds = _KEPT_WEIGHT * kept.tokens, _KEPT_WEIGHT * kept.seconds
        self._num_tokens = kept.num_tokens

    def measured(self, total_tokens: int) -> MeasuredRate:
        return MeasuredRate(
            decision=self._decision,
            tokens_per_s=self._tokens / max(self._seconds, 1e-9),
            num_tokens=self._num_tokens,
            num_tokens_since=total_tokens - self._last_total,
        )


class Tracker:
    """The measurements of one route and drafter, kept across requests."""

    def __init__(self) -> None:
        self._stages: list[LineFit] = []
        self._links_s = 0.0
        self._queue_s = 0.0
        self._num_verdicts = 0
        self._num_sharing = 1.0
        self._confidence = _PRIOR_HAZARDS[0]
        self._draft = LineFit()
        self._hits_by_rank = [0.0] * len(_PRIOR_HAZARDS)
        self._tries_by_rank = [0.0] * len(_PRIOR_HAZARDS)
        self._sharpening = Sharpening()
        self._rates: dict[str, _Rate] = {}
        self._num_tokens = 0
        self._num_outcomes = 0
        self._hinted: list[tuple[int, float, float]] = []

    def verdict(self, *, traversal_s: float, costs: Sequence[StageCost], waited_s: float) -> None:
        """Add the first verdict of a window, received `traversal_s` after sending, and its cost at each stage.

        waited_s: the time between the window's arrival at each stage and its pass there, summed.
        """
        stage_s = [cost.us / 1e6 for cost in costs]
        if len(costs) != len(self._stages):
            self._stages = [LineFit() for _ in costs]
            self._num_verdicts = 0
        for fit, cost, seconds in zip(self._stages, costs, stage_s, strict=True):
            fit.add(cost.num_rows, seconds)
        self._num_verdicts += 1
        share = max(1 - _DECAY, 1 / self._num_verdicts)
        num_sessions = max((cost.num_sessions for cost in costs), default=1)
        self._num_sharing += (1 - _DECAY) * (num_sessions - self._num_sharing)
        links_s = max(0.0, traversal_s - sum(stage_s) - waited_s)
        self._queue_s += share * (waited_s - self._queue_s)
        # A frame that was lost and sent again says nothing about the next one.
        usual_s = 2 * self._links_s + _LINK_SLACK_S if self._num_verdicts > 1 else links_s
        self._links_s += share * (min(links_s, usual_s) - self._links_s)

    def draft_step(self, num_stems: int, seconds: float) -> None:
        """Add one draft step over `num_stems` stems."""
        self._draft.add(num_stems, seconds)

    def drafter_moved(self, level_s: float) -> None:
        """Forget what the last drafter cost and gave; the new one is expected to take `level_s` seconds a step."""
        self._draft = LineFit()
        self._draft.add(1, level_s)
        self._rates = {kind: rate for kind, rate in self._rates.items() if kind == Mode.PLAIN}

    def sharpened(self, logprobs: Sequence[float]) -> list[float]:
        """Return the log probabilities of one node's candidates, corrected by experience."""
        return self._sharpening.apply(logprobs)

    def outcome(self, rank: int | None, logprobs: Sequence[float] = ()) -> None:
        """Add one committed token that the drafter was asked for: its rank, or None if it was no candidate.

        logprobs: those of all candidates for this token, likeliest first.
        """
        if logprobs:
            self._sharpening.learn(rank, logprobs)
            self._confidence += (1 - _DECAY) * (math.exp(logprobs[0]) - self._confidence)
        # The drafter may name fewer candidates than it was asked for; the missing ones count as wrong.
        num_tried = len(self._tries_by_rank) if rank is None else rank + 1
        for tried in range(min(num_tried, len(self._tries_by_rank))):
            self._tries_by_rank[tried] = self._tries_by_rank[tried] * _OUTCOME_DECAY + 1
            self._hits_by_rank[tried] = self._hits_by_rank[tried] * _OUTCOME_DECAY + (tried == rank)
        self._hinted = [
            (each, _OUTCOME_DECAY * hits, _OUTCOME_DECAY * tries) if each < num_tried else (each, hits, tries)
            for each, hits, tries in self._hinted
        ]
        self._num_outcomes += 1

    def progress(self, decision: Decision, num_tokens: int, seconds: float) -> None:
        """Add tokens committed, and seconds spent, while windows of this kind were in use."""
        self._num_tokens += num_tokens
        self._rates.setdefault(decision.kind, _Rate(decision)).add(num_tokens, seconds, self._num_tokens)

    def expect(self, passes_s: Sequence[tuple[float, float]], links_s: float, step_s: float) -> None:
        """Begin with what planning expects of a route that no request has measured yet.

        passes_s: of each stage, the seconds over 1 and over 16 positions. links_s: those of all links of a traversal.
        step_s: those of a draft step.
        """
        self._stages = [LineFit() for _ in passes_s]
        for fit, (narrow_s, wide_s) in zip(self._stages, passes_s, strict=True):
            fit.add(1, narrow_s)
            fit.add(16, wide_s)
        self._links_s, self._num_verdicts = links_s, 1
        self._draft.add(1, step_s)

    def kept(self) -> Kept:
        """Return what the next tracker of this route and drafter may begin with: what was measured here, without hints."""
        hits, tries = list(self._hits_by_rank), list(self._tries_by_rank)
        for rank, hinted_hits, hinted_tries in self._hinted:
            # Hints fade with each outcome that their rank had.
            hits[rank] = max(0.0, hits[rank] - hinted_hits)
            tries[rank] = max(hits[rank], tries[rank] - hinted_tries)
        return Kept(
            stages=tuple(fit.sums() for fit in self._stages),
            links_s=self._links_s,
            queue_s=self._queue_s,
            num_sharing=self._num_sharing,
            confidence=self._confidence,
            draft=self._draft.sums(),
            hits_by_rank=tuple(hits),
            tries_by_rank=tuple(tries),
            exponent=self._sharpening.exponent,
            num_outcomes=self._num_outcomes,
            rates=tuple(rate.kept() for rate in self._rates.values()),
        )

    def calibrate(self, hint: Calibration) -> None:
        """Begin with how often the drafter was right for another coordinator, unless it was tried here already."""
        if self._num_outcomes > _MAX_OUTCOMES_BEFORE_HINTS:
            return
        for rank, (hits, tries) in enumerate(zip(hint.hits, hint.tries, strict=False)):
            if rank < len(self._tries_by_rank) and tries > 0 and hits <= tries:
                # However much another claims to have tried, it counts no more than our own memory would.
                weight = _HINT_WEIGHT * min(1.0, _REMEMBERED_OUTCOMES / tries)
                self._hinted.append((rank, weight * hits, weight * tries))
                self._hits_by_rank[rank] += weight * hits
                self._tries_by_rank[rank] += weight * tries
        self._confidence = hint.confidence
        self._sharpening.exponent = max(_LEAST_SHARPENING, min(_MOST_SHARPENING, hint.exponent))

    def begin(self, kept: Kept) -> None:
        """Begin with what an earlier tracker of this route and drafter left; new measurements soon outweigh it."""
        self._stages = [LineFit() for _ in kept.stages]
        for fit, sums in zip(self._stages, kept.stages, strict=True):
            fit.begin(sums)
        self._draft.begin(kept.draft)
        self._links_s, self._queue_s, self._num_verdicts = kept.links_s, kept.queue_s, _KEPT_VERDICTS
        self._num_sharing, self._confidence = kept.num_sharing, kept.confidence
        ranks = range(min(len(self._hits_by_rank), len(kept.hits_by_rank), len(kept.tries_by_rank)))
        for rank in ranks:
            self._hits_by_rank[rank] = _KEPT_WEIGHT * kept.hits_by_rank[rank]
            self._tries_by_rank[rank] = _KEPT_WEIGHT * kept.tries_by_rank[rank]
        self._sharpening.exponent = max(_LEAST_SHARPENING, min(_MOST_SHARPENING, kept.exponent))
        self._num_outcomes = kept.num_outcomes
        for rate in kept.rates:
            self._rates[rate.decision.kind] = begun = _Rate(rate.decision)
            begun.begin(rate)

    def observe(self) -> Observation:
        """Return the current observation."""
        return Observation(
            stages=tuple(fit.line() for fit in self._stages),
            links_s=self._links_s,
            draft=self._draft.line(),
            hit_rate_by_rank=self._hit_rates(),
            num_outcomes=self._num_outcomes,
            confidence=self._confidence,
            num_sharing=self._num_sharing,
            queue_s=self._queue_s,
            measured={kind: rate.measured(self._num_tokens) for kind, rate in self._rates.items()},
        )

    def _hit_rates(self) -> tuple[float, ...]:
        """Return the hit rate of each rank, estimated given that the ranks before it failed.

        A drafter whose first candidate does worse than the prior is expected to do worse with its others too.
        """
        rates: list[float] = []
        left, quality = 1.0, 1.0
        weight = _PRIOR_WEIGHT + _FIRST_PRIOR_WEIGHT * _OUTCOME_DECAY**self._num_outcomes
        for hits, tries, prior in zip(self._hits_by_rank, self._tries_by_rank, _PRIOR_HAZARDS, strict=True):
            hazard = (hits + weight * prior * quality) / (tries + weight)
            if not rates:
                quality = min(1.0, hazard / prior)
            rates.append(left * hazard)
            left *= 1 - hazard
        return tuple(rates)

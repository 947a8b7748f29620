"""Counts what the arms of a benchmark wrote. An arm is one way to speculate; all arms are counted alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from dsd_p2p.coordination.statistics import AnswerStatistics
from node.lab.receipt import Sample, sample

PLAIN_ARM = "plain"


@dataclass(slots=True)
class ArmRuns:
    """The answers of one arm.

    num_tokens, seconds: by round, the tokens after the first arrival and the time they took. runs: for each answer, what
    its prompt is called (such as its category), and the statistics.
    """

    num_tokens: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    runs: list[tuple[Mapping[str, str], AnswerStatistics]] = field(default_factory=list)

    def add(self, round_number: int, prompt: Mapping[str, str], stats: AnswerStatistics) -> None:
        """Add one answer. prompt: what receipts say of its prompt, by key."""
        timing = stats.timing
        self.num_tokens[round_number] = self.num_tokens.get(round_number, 0) + timing.num_later_tokens
        self.seconds[round_number] = self.seconds.get(round_number, 0.0) + timing.later_s
        self.runs.append((prompt, stats))

    def rows(self) -> list[dict[str, object]]:
        """Return the answers in the form that receipts keep."""
        return [{**prompt, **stats.as_json()} for prompt, stats in self.runs]

    def tokens_per_s(self) -> list[float]:
        """Return each round's tokens a second: all its tokens over all their time, so that slow texts weigh most."""
        return [self.num_tokens[number] / self.seconds[number] for number in sorted(self.seconds)]

    def speed(self) -> float:
        """Return the tokens a second over all rounds together.

        Each round has its own texts, so a median of the rounds would compare different texts.
        """
        return sum(self.num_tokens.values()) / sum(self.seconds.values())


def ratios_to_plain(arms: Mapping[str, ArmRuns]) -> dict[str, Sample]:
    """Return each arm's speed over that of plain decoding, round by round."""
    plain = arms[PLAIN_ARM].tokens_per_s()
    return {
        name: sample([speed / base for speed, base in zip(runs.tokens_per_s(), plain, strict=True)])
        for name, runs in arms.items()
        if name != PLAIN_ARM
    }


def mean_accepted_length(runs: ArmRuns) -> float:
    """Return the median over the runs of committed tokens per epoch (docs/benchmarks.md)."""
    return median(stats.details.mean_accepted_length for _, stats in runs.runs if stats.details is not None)

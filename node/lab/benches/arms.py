"""What every benchmark compares: one arm per way to speculate, run in turn and counted the same way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from node.lab.receipt import Sample, sample

PLAIN_ARM = "plain"


@dataclass(slots=True)
class ArmRuns:
    """What one arm wrote: tokens after the first arrival and the seconds they took, by round, and each run's statistics."""

    num_tokens: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    runs: list[dict[str, object]] = field(default_factory=list)

    def add(self, round_number: int, stats: dict[str, object]) -> None:
        """Take in one run's statistics (`node.client.client.summarise`)."""
        num_later, later_s = stats["num_later_tokens"], stats["later_s"]
        assert isinstance(num_later, int)
        assert isinstance(later_s, float)
        self.num_tokens[round_number] = self.num_tokens.get(round_number, 0) + num_later
        self.seconds[round_number] = self.seconds.get(round_number, 0.0) + later_s
        self.runs.append(stats)

    def tokens_per_s(self) -> list[float]:
        """Tokens a second of each round: all its tokens over all their time, so that slow texts weigh most."""
        return [self.num_tokens[number] / self.seconds[number] for number in sorted(self.seconds)]

    def speed(self) -> float:
        """Tokens a second over all rounds, which have texts of their own: their median would compare one text with another."""
        return sum(self.num_tokens.values()) / sum(self.seconds.values())


def ratios_to_plain(arms: Mapping[str, ArmRuns]) -> dict[str, Sample]:
    """Return each arm's speed over plain, round by round."""
    plain = arms[PLAIN_ARM].tokens_per_s()
    return {
        name: sample([speed / base for speed, base in zip(runs.tokens_per_s(), plain, strict=True)])
        for name, runs in arms.items()
        if name != PLAIN_ARM
    }


def mean_accepted_length(runs: ArmRuns) -> float:
    """Return the median over the runs of committed tokens per epoch (docs/benchmarks.md)."""
    values = [stats["mean_accepted_length"] for stats in runs.runs]
    return median(value for value in values if isinstance(value, float))

"""Records when the tokens of one answer arrived; the only place that computes tokens per second."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Timing:
    """The arrival times of one answer, in seconds on one clock.

    Speed is measured from the first arrival, so that only `ttft_s` includes the prompt's cost.
    first_size: number of tokens in the first arrival.
    """

    started_at_s: float
    first_at_s: float = 0.0
    last_at_s: float = 0.0
    first_size: int = 0
    num_tokens: int = 0

    def arrived(self, num_tokens: int, now_s: float) -> None:
        """Count tokens that have just arrived together."""
        if not self.num_tokens:
            self.first_at_s, self.first_size = now_s, num_tokens
        self.last_at_s = now_s
        self.num_tokens += num_tokens

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_at_s - self.started_at_s

    @property
    def total_s(self) -> float:
        """Time to the last token."""
        return self.last_at_s - self.started_at_s

    @property
    def num_later_tokens(self) -> int:
        """Number of tokens after the first arrival."""
        return self.num_tokens - self.first_size

    @property
    def later_s(self) -> float:
        """Time between the first and the last arrival."""
        return self.last_at_s - self.first_at_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first arrival, or over the whole time if all tokens arrived at once."""
        if self.later_s > 0:
            return self.num_later_tokens / self.later_s
        return self.num_tokens / self.total_s if self.total_s > 0 else 0.0

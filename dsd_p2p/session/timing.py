"""When the tokens of one answer arrived, and the one formula for tokens a second."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Timing:
    """Times in seconds, all on one clock. Speeds count from the first arrival on, so the prompt's cost is in `ttft_s` alone.

    first_size: tokens that arrived together with the first.
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
        """Tokens after those of the first arrival."""
        return self.num_tokens - self.first_size

    @property
    def later_s(self) -> float:
        """Time between the first and the last arrival."""
        return self.last_at_s - self.first_at_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first arrival; over the whole time where everything arrived at once."""
        if self.later_s > 0:
            return self.num_later_tokens / self.later_s
        return self.num_tokens / self.total_s if self.total_s > 0 else 0.0

"""What a request asks for, over which stages, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.types import Endpoint, HiddenFormat, ModelKey, PeerId, SessionId, TextRequest, TokenId
from dsd_p2p.window.base import Decision
from dsd_p2p.wire.messages import Hop, Prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The stages that a request's windows pass, head first; together they hold the model.

    max_positions: the longest text that all of them take.
    """

    hops: tuple[Hop, ...]
    model: ModelKey
    max_positions: int

    @property
    def head(self) -> PeerId:
        """The stage that windows are sent to."""
        return PeerId(self.hops[0].peer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text that a coordinator has the target write.

    prompt: at least one token; the last `num_written` of them belong to the answer already.
    coordinator: where verdicts are sent.
    prefill_chunk: prompt tokens a window; chunks follow each other through the stages like an assembly line.
    stall_timeout_s: without a verdict for this long the route counts as lost.
    hidden_formats: of each link between stages; empty is the model's own.
    attest: stages sign what they compute.
    prefix: what of the prompt the route's stages have parked. is_parked: they park the text when it is finished.
    """

    session: SessionId
    prompt: Sequence[TokenId]
    text: TextRequest
    vocab_size: int
    coordinator: Endpoint
    num_written: int = 0
    prefill_chunk: int = 128
    stall_timeout_s: float = 60.0
    hidden_formats: tuple[HiddenFormat, ...] = ()
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    attest: bool = False
    prefix: Prefix | None = None
    is_parked: bool = False

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt itself."""
        return len(self.prompt) - self.num_written

    @property
    def max_length(self) -> int:
        """Length of the finished text at most, prompt included."""
        return self.num_prompt + self.text.max_tokens

    @property
    def is_relaxed(self) -> bool:
        """True when the target's own token may be passed over."""
        return self.text.relaxation is not None


_MAX_DECISIONS = 64


@dataclass(slots=True, kw_only=True)
class RequestStats:  # size: counts, each written in one place and read by name in reports
    """Counts of one request; they add up over its replays.

    num_misses: verdicts that named a token no window carried: each costs a traversal. Plain decoding counts every token.
    link_bytes: bytes of window frames that all stages together have received, as the newest verdict told.
    num_prefix_tokens: prompt tokens that the stages had parked and that were not sent.
    num_epochs: committed tokens over epochs is the mean accepted length (in sync mode: tokens a window, as in the papers).
    num_replays, num_resumes: routes opened after the first; of those, with stages that went on with what they held.
    hits_by_depth, outcomes_by_depth: for d = 1, 2, ...: of the committed tokens whose parent was drafted d - 1 below the root and
        expanded, how many were among the candidates, and how many there were.
    hits_by_rank: how often the committed token was the drafter's first, second, ... candidate.
    decisions: the policy's changes of mind: at which text length, what, and why.
    sent_by_source, hits_by_source: nodes sent and tokens committed of each drafter's candidates: its payoff.
    """

    num_windows: int = 0
    num_nodes_sent: int = 0
    num_prefill_tokens: int = 0
    num_prefix_tokens: int = 0
    num_misses: int = 0
    num_epochs: int = 0
    num_stale_nodes: int = 0
    num_draft_steps: int = 0
    num_drafted_nodes: int = 0
    num_replays: int = 0
    num_resumes: int = 0
    num_verdicts: int = 0
    num_relaxed_tokens: int = 0
    max_windows_in_flight: int = 0
    link_bytes: int = 0
    draft_s: float = 0.0
    stage_s: list[float] = field(default_factory=list)
    first_token_at_s: float | None = None
    hits_by_depth: list[int] = field(default_factory=list)
    outcomes_by_depth: list[int] = field(default_factory=list)
    hits_by_rank: list[int] = field(default_factory=list)
    sent_by_source: dict[str, int] = field(default_factory=dict)
    hits_by_source: dict[str, int] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)

    def note_decision(self, num_tokens: int, decision: Decision) -> None:
        """Remember that the policy changed its mind, and why."""
        if len(self.decisions) < _MAX_DECISIONS:
            self.decisions.append(f"{num_tokens}: {decision.mode} {decision.reason}")

    def add_stage_s(self, stage_s: Sequence[float]) -> None:
        """Count what each stage took for one window, seconds."""
        totals = self.stage_s or [0.0] * len(stage_s)
        self.stage_s = [a + b for a, b in zip(totals, stage_s, strict=False)]

    def outcome(self, *, depth: int, rank: int | None, source: str) -> None:
        """Count one committed token that a drafter was asked for; `rank` None: it was no candidate."""
        _count(self.outcomes_by_depth, depth - 1, 1)
        _count(self.hits_by_depth, depth - 1, rank is not None)
        if rank is not None:
            _count(self.hits_by_rank, rank, 1)
            self.hits_by_source[source] = self.hits_by_source.get(source, 0) + 1


def _count(counts: list[int], index: int, amount: int) -> None:
    counts.extend([0] * (index + 1 - len(counts)))
    counts[index] += amount

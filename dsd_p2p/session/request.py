"""Holds a request's data: what it asks for, the route, and counts of what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.types import Endpoint, HiddenFormat, ModelKey, PeerId, SessionId, TextRequest, TokenId
from dsd_p2p.window.base import Decision
from dsd_p2p.wire.messages import Hop, Prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The stages that a request's windows pass, head first; together they hold the model.

    max_positions: length of the longest text that all of them accept.
    """

    hops: tuple[Hop, ...]
    model: ModelKey
    max_positions: int

    @property
    def head(self) -> PeerId:
        """The stage that windows are sent to."""
        return PeerId(self.hops[0].peer)


NODE_S = 0.1
"""Seconds that a node may take over all stages, apart from the stall timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request for a text, as its coordinator runs it.

    prompt: at least one token; the last `num_written` of them already belong to the answer.
    coordinator: the peer to which verdicts are sent.
    prefill_chunk: prompt tokens per window; the stages process successive chunks as a pipeline.
    stall_timeout_s: the route counts as lost after this long without a verdict, and a tenth of a second for each node in
        flight.
    hidden_formats: the hidden format of each link between stages; empty means the model's own.
    attest: the stages sign what they compute.
    prefix: the beginning of the prompt that the stages have parked. is_parked: the stages park the finished text.
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
        """Number of tokens of the prompt itself, without those already written."""
        return len(self.prompt) - self.num_written

    @property
    def max_length(self) -> int:
        """Greatest length of the finished text, prompt included."""
        return self.num_prompt + self.text.max_tokens

    @property
    def is_relaxed(self) -> bool:
        """True in relaxed mode, where a drafted token may stand in place of the target's own."""
        return self.text.relaxation is not None


_MAX_DECISIONS = 64


@dataclass(slots=True, kw_only=True)
class RequestStats:  # size: counts, each written in one place and read by name in reports
    """Counts of one request, added up over its replays unless stated otherwise.

    num_misses: committed tokens that no window carried; each costs a traversal. In plain mode every token is one.
    link_bytes: bytes of window frames that all stages together have received, by the highest count in a verdict.
    num_prefix_tokens: prompt tokens that were parked and not sent, in the last opening that gave the stages the text.
    num_epochs: committed tokens divided by epochs is the mean accepted length (in sync mode, tokens per window, as in
        the papers).
    num_replays, num_resumes: routes opened after the first, and how many of those had kept stages.
    outcomes_by_depth, hits_by_depth: for d = 1, 2, ...: committed tokens whose parent had candidates and was drafted
        d - 1 below the root, and how many of these tokens were in the tree.
    hits_by_rank: how often the committed token's node had rank 0, 1, ... among its siblings.
    decisions: the policy's changed decisions, each with the text length, the mode and the reason.
    sent_by_source, hits_by_source: for each drafter, its nodes that were sent, and its candidates that were committed.
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
    relaxed_nats: float = 0.0
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
        """Record that the policy changed its decision, and why."""
        if len(self.decisions) < _MAX_DECISIONS:
            self.decisions.append(f"{num_tokens}: {decision.mode} {decision.reason}")

    def add_stage_s(self, stage_s: Sequence[float]) -> None:
        """Add each stage's time for one window, in seconds."""
        totals = self.stage_s or [0.0] * len(stage_s)
        self.stage_s = [a + b for a, b in zip(totals, stage_s, strict=False)]

    def outcome(self, *, depth: int, rank: int | None, source: str) -> None:
        """Count a committed token for which a drafter had candidates. rank: its node's rank; None without a node."""
        _count(self.outcomes_by_depth, depth - 1, 1)
        _count(self.hits_by_depth, depth - 1, rank is not None)
        if rank is not None:
            _count(self.hits_by_rank, rank, 1)
            self.hits_by_source[source] = self.hits_by_source.get(source, 0) + 1


def _count(counts: list[int], index: int, amount: int) -> None:
    counts.extend([0] * (index + 1 - len(counts)))
    counts[index] += amount

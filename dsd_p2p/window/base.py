"""The seam between the coordinator and what decides how much it speculates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Mode(StrEnum):
    """What the coordinator does while a traversal is under way."""

    PLAIN = "plain"
    """Waits: one token per traversal."""

    SYNC = "sync"
    """Drafts a window, sends it, waits for its verdict: the synchronous algorithm of arXiv:2511.11733."""

    CONTINUOUS = "continuous"
    """Keeps drafting and sending; verdicts re-root the tree while the rest is in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the coordinator may do until the next decision.

    depth: deepest draft below the root, tokens; 0 in plain mode.
    width: children kept of each expanded node; 1 is a chain.
    expand_nodes: nodes whose children are drafted in one step. A synchronous window is sent after `depth` steps.
    window_nodes: most nodes one window carries.
    max_in_flight: most windows without a verdict.
    max_nodes: most sent nodes below the root, the root included.
    min_path_prob: a node less likely than this, seen from the root, is neither expanded nor sent for now.
    reason: for people, in a few words.
    """

    mode: Mode
    depth: int = 0
    width: int = 1
    expand_nodes: int = 1
    window_nodes: int = 1
    max_in_flight: int = 1
    max_nodes: int = 0
    min_path_prob: float = 0.0
    reason: str = ""

    @property
    def kind(self) -> str:
        """What tells decisions apart whose speed is measured apart."""
        match self.mode:
            case Mode.PLAIN:
                return "plain"
            case Mode.SYNC:
                return f"sync {self.depth}x{self.width}"
            case Mode.CONTINUOUS:
                return f"continuous {self.window_nodes}x{self.width}, {self.max_in_flight} in flight"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLine:
    """`fixed_s + per_node_s * n`: seconds of one pass over n nodes, or of a draft step over n stems."""

    fixed_s: float
    per_node_s: float

    def at(self, num_nodes: float) -> float:
        """Seconds for `num_nodes`."""
        return self.fixed_s + self.per_node_s * num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRate:
    """What one kind of window (`Decision.kind`) achieved: tokens a second lately, tokens in all, tokens written by others since."""

    decision: Decision
    tokens_per_s: float
    num_tokens: int
    num_tokens_since: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is known of a route and its drafter when a decision is due.

    stages: one cost line per stage; empty before the first verdict. num_sharing: sessions that share a stage's pass.
    links_s: seconds a traversal spends outside the stages' computation, return link included.
    draft: cost line of one draft step over n stems.
    hit_rate_by_rank: share of the committed tokens that were the drafter's first, second, ... candidate.
    num_outcomes: committed tokens that this is known from. confidence: what the drafter gave its first candidates lately.
    queue_s: seconds that windows lately waited at the stages.
    measured: what each kind of window (`Decision.kind`) was seen to write on this route.
    """

    stages: tuple[CostLine, ...] = ()
    num_sharing: float = 1.0
    links_s: float = 0.0
    draft: CostLine = CostLine(fixed_s=0.0, per_node_s=0.0)
    hit_rate_by_rank: tuple[float, ...] = field(default=())
    num_outcomes: int = 0
    confidence: float = 0.0
    queue_s: float = 0.0
    measured: Mapping[str, MeasuredRate] = field(default_factory=dict)

    def traversal_s(self, num_nodes: float) -> float:
        """T(n): seconds from sending a window of n nodes to its verdict, none of our own before it.

        Those who share its passes are taken to send as much as we do: what one gains at the others' cost is no gain.
        """
        num_rows = num_nodes * self.num_sharing
        return max(_SHORTEST_S, self.links_s + sum(stage.at(num_rows) for stage in self.stages))

    def slowest_stage_s(self, num_nodes: float) -> float:
        """Seconds between two windows of n nodes at the route's bottleneck."""
        return max((stage.at(num_nodes * self.num_sharing) for stage in self.stages), default=0.0)

    def pace_s(self, num_nodes: float) -> float:
        """Seconds to leave between two windows of up to n nodes.

        Faster than the slowest stage takes them, they only queue there, in front of better ones; at just its speed the queue still
        grows, since passes scatter, and a machine that others share has nothing left for them.
        """
        return _ROOM * self.slowest_stage_s(num_nodes)


_SHORTEST_S = 1e-6
"""As finely as stages report their times."""

_ROOM = 1.3
"""Of 1.0, 1.3, 1.5: on two cores for everything 1.3 writes 5 % more than 1.0 with the best window, on machines of their own 0.7 %
less (geometric means over eight simulated routes; 1.5: 7 % and 1.8 %)."""


class WindowPolicy(Protocol):
    """Decides how much to speculate; one instance serves one request at a time."""

    def decide(self, observation: Observation) -> Decision:
        """Return what to do from now on; called at the start and after each verdict."""
        ...

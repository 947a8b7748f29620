"""The interface between the coordinator and the policy that decides how much it speculates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Mode(StrEnum):
    """How the coordinator uses the time of a traversal."""

    PLAIN = "plain"
    """Wait: one token per traversal."""

    SYNC = "sync"
    """Draft a window, send it, and wait for its verdict: the synchronous algorithm of arXiv:2511.11733."""

    CONTINUOUS = "continuous"
    """Keep drafting and sending; verdicts re-root the tree while other windows are in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the coordinator may do until the next decision.

    depth: maximum depth of the tree below the root, in tokens; 0 in plain mode.
    width: children kept per expanded node; 1 is a chain.
    expand_nodes: stems per draft step. A synchronous window is sent after `depth` steps.
    window_nodes: maximum nodes per window.
    max_in_flight: maximum windows without a verdict.
    max_nodes: maximum sent nodes in the tree, the root included.
    min_path_prob: nodes with a lower path probability from the root are neither expanded nor sent for now.
    reason: a few words for people.
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
        """The name under which this decision's speed is measured."""
        match self.mode:
            case Mode.PLAIN:
                return "plain"
            case Mode.SYNC:
                return f"sync {self.depth}x{self.width}"
            case Mode.CONTINUOUS:
                return f"continuous {self.window_nodes}x{self.width}, {self.max_in_flight} in flight"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLine:
    """A linear cost: a pass over n nodes, or a draft step over n stems, takes `fixed_s + per_node_s * n` seconds."""

    fixed_s: float
    per_node_s: float

    def at(self, num_nodes: float) -> float:
        """Return the seconds for `num_nodes`."""
        return self.fixed_s + self.per_node_s * num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRate:
    """The measured speed of one kind of window (`Decision.kind`).

    tokens_per_s: its recent rate. num_tokens: tokens it wrote in all. num_tokens_since: tokens that other kinds wrote
    since.
    """

    decision: Decision
    tokens_per_s: float
    num_tokens: int
    num_tokens_since: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a policy knows about a route and its drafter.

    stages: one cost line per stage; empty before the first verdict. num_sharing: sessions that share a stage's pass.
    links_s: seconds of a traversal outside the stages' computation, return link included.
    draft: cost line of one draft step over n stems.
    hit_rate_by_rank: how often the committed token was the drafter's first, second, ... candidate.
    num_outcomes: committed tokens behind these rates. confidence: recent probability of the drafter's first candidates.
    queue_s: recent seconds that a window waits at the stages.
    measured: the measured speed of each kind of window (`Decision.kind`) on this route.
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
        """Return T(n): seconds from sending a window of n nodes to its verdict, with none of our windows ahead of it.

        Assumes that the sessions sharing its passes send as much as we do: a gain at their cost is no gain.
        """
        num_rows = num_nodes * self.num_sharing
        return max(_SHORTEST_S, self.links_s + sum(stage.at(num_rows) for stage in self.stages))

    def slowest_stage_s(self, num_nodes: float) -> float:
        """Return the seconds between two windows of n nodes at the route's bottleneck."""
        return max((stage.at(num_nodes * self.num_sharing) for stage in self.stages), default=0.0)

    def pace_s(self, num_nodes: float) -> float:
        """Return the seconds to leave between two windows of up to n nodes.

        Windows sent faster than the slowest stage takes them only queue there, ahead of better ones. At exactly its
        speed the queue still grows, because pass times vary, and a shared machine has no time left for others.
        """
        return _ROOM * self.slowest_stage_s(num_nodes)


_SHORTEST_S = 1e-6
"""One microsecond, the resolution of the times that stages report."""

_ROOM = 1.3
"""Pace in passes of the slowest stage. With the best window, 1.3 writes 5 % more than 1.0 when all peers share two
cores, and 0.7 % less when each has its own machine; 1.5 writes 7 % more and 1.8 % less (geometric means over eight
simulated routes)."""


class WindowPolicy(Protocol):
    """Decides how much to speculate; one instance serves one request at a time."""

    def decide(self, observation: Observation) -> Decision:
        """Return the decision from now on; called at the start and after each verdict."""
        ...

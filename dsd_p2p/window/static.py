"""The same decision for the whole request."""

from dsd_p2p.window.base import Decision, Mode, Observation

_MAX_SENT_NODES = 896
"""Bounds the stages' caches only (`StageLimits.max_draft_slots`): what is worth a place is decided by its path's probability."""

SYNC_TREES = ((4, 2), (8, 4), (16, 6))
"""(nodes, draft steps) of the synchronous trees that are considered."""

PLAIN = Decision(mode=Mode.PLAIN, reason="asked for")


def sync_chain(depth: int) -> Decision:
    """Return the synchronous algorithm of arXiv:2511.11733 with γ = `depth` (the paper: 8)."""
    return Decision(
        mode=Mode.SYNC, depth=depth, window_nodes=depth + 1, max_nodes=depth + 1, reason=f"asked for γ={depth}"
    )


def sync_tree(num_nodes: int, depth: int, width: int = 4) -> Decision:
    """Return the synchronous tree: `depth` draft steps, then the `num_nodes` likeliest nodes (cf. EAGLE-2, arXiv:2406.16858)."""
    return Decision(
        mode=Mode.SYNC,
        depth=depth,
        width=width,
        expand_nodes=max(1, num_nodes // 4),
        window_nodes=num_nodes + 1,
        max_nodes=num_nodes + 1,
        reason=f"asked for {num_nodes} nodes",
    )


def continuous_tree(
    *, depth: int, width: int, window_nodes: int, max_in_flight: int, min_path_prob: float = 0.02
) -> Decision:
    """Return a continuous tree; `width` 1 is a continuous chain."""
    return Decision(
        mode=Mode.CONTINUOUS,
        depth=depth,
        width=width,
        expand_nodes=1 if width == 1 else window_nodes,
        window_nodes=window_nodes,
        max_in_flight=max_in_flight,
        max_nodes=max(_MAX_SENT_NODES, 2 * window_nodes),
        min_path_prob=0.0 if width == 1 else min_path_prob,
        reason="asked for",
    )


def usual_tree(width: int, window_nodes: int, max_in_flight: int) -> Decision:
    """Return the continuous tree of that size with the depth and the least path probability that serve all sizes well."""
    return continuous_tree(
        depth=96,
        width=width,
        window_nodes=window_nodes,
        max_in_flight=max_in_flight,
        min_path_prob=0.001 if width > 4 else 0.02,
    )


class StaticPolicy:
    """Always decides the same."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    def decide(self, observation: Observation) -> Decision:
        """Return the fixed decision."""
        return self._decision

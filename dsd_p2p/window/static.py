"""The same decision for the whole request."""

from dsd_p2p.window.base import Decision, Mode, Observation

_MAX_TREE_NODES = 512
"""Bounds memory only: what is worth a place is decided by its path's probability."""

PLAIN = Decision(mode=Mode.PLAIN, reason="asked for")


def sync_chain(depth: int) -> Decision:
    """Return the synchronous algorithm of arXiv:2511.11733 with γ = `depth` (the paper: 8)."""
    return Decision(mode=Mode.SYNC, depth=depth, window_nodes=depth + 1, max_nodes=depth, reason=f"asked for γ={depth}")


def continuous_tree(*, depth: int, width: int, window_nodes: int, max_in_flight: int) -> Decision:
    """Return a continuous tree; `width` 1 is a continuous chain."""
    return Decision(
        mode=Mode.CONTINUOUS,
        depth=depth,
        width=width,
        expand_nodes=1 if width == 1 else max(1, window_nodes // 2),
        window_nodes=window_nodes,
        max_in_flight=max_in_flight,
        max_nodes=depth if width == 1 else _MAX_TREE_NODES,
        min_path_prob=0.0 if width == 1 else 0.02,
        reason="asked for",
    )


class StaticPolicy:
    """Always decides the same."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    def decide(self, observation: Observation) -> Decision:
        """Return the fixed decision."""
        return self._decision

"""The static policy, one fixed decision per request, and the windows that it and other policies use."""

from dsd_p2p.window.base import Decision, Mode, Observation

_MAX_SENT_NODES = 896
"""Bounds only the stages' caches (`StageLimits.max_draft_slots`); path probabilities decide which nodes get a place."""

SYNC_TREES = ((4, 2), (8, 4), (16, 6))
"""(nodes, draft steps) of the synchronous trees considered."""

PLAIN = Decision(mode=Mode.PLAIN, reason="asked for")


def sync_chain(depth: int) -> Decision:
    """Return a synchronous chain: the algorithm of arXiv:2511.11733 with γ = `depth` (the paper uses 8)."""
    return Decision(
        mode=Mode.SYNC, depth=depth, window_nodes=depth + 1, max_nodes=depth + 1, reason=f"asked for γ={depth}"
    )


def sync_tree(num_nodes: int, depth: int, width: int = 4) -> Decision:
    """Return a synchronous tree: the `num_nodes` likeliest nodes of `depth` steps (cf. EAGLE-2, arXiv:2406.16858)."""
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


_WIDE, _LEAST_PATH, _LEAST_WIDE_PATH = 4, 0.02, 0.001
"""Least probability of a path to be drafted. Trees with more children to a node than `_WIDE` get room for unlikely ones too."""

_USUAL_DEPTH = 96
"""Levels below the root: more than any window in flight reaches, so that the nodes, not the depth, are the bound."""


def usual_tree(width: int, window_nodes: int, max_in_flight: int) -> Decision:
    """Return a continuous tree of this size, with the usual depth and minimum path probability."""
    return continuous_tree(
        depth=_USUAL_DEPTH,
        width=width,
        window_nodes=window_nodes,
        max_in_flight=max_in_flight,
        min_path_prob=_LEAST_WIDE_PATH if width > _WIDE else _LEAST_PATH,
    )


class StaticPolicy:
    """A policy that always returns the same decision."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    def decide(self, observation: Observation) -> Decision:
        """Return the fixed decision."""
        return self._decision

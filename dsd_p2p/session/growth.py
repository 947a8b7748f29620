"""Chooses which nodes to expand and which to send, both best-first by path probability.

If a node is sent later than its parent, it delays the text by that difference when the text passes through it, and not
at all otherwise. The expected delay is therefore least when the nodes with the greatest path probability always go
first, at any depth. Beams of one depth would let combinations far ahead displace nodes that are needed next. A node's
probability rises as the root moves towards it, so an unlikely node waits and is not lost.
"""

import heapq
import math
from collections.abc import Container, Iterator

from dsd_p2p.session.tree import DraftNode, DraftTree, path_logprob
from dsd_p2p.window.base import Decision


def choose_stems(tree: DraftTree, decision: Decision, last_position: int) -> list[DraftNode]:
    """Return the likeliest unexpanded nodes at positions before `last_position`, at most `decision.expand_nodes`."""
    least = _min_logprob(decision)
    last_position = min(tree.root.position + decision.depth, last_position)
    stems = [node for node in tree.unexpanded.values() if node.path_logprob >= least and node.position < last_position]
    stems.sort(key=path_logprob, reverse=True)
    return stems[: decision.expand_nodes]


def choose_unsent(tree: DraftTree, decision: Decision, limit: int, held: Container[int] = ()) -> list[DraftNode]:
    """Return the (at most) `limit` likeliest unsent nodes, each after its parent; an unsent root comes first.

    held: keys of nodes that must not be sent yet.
    """
    least = _min_logprob(decision)
    frontier = [tree.root] if tree.root.number is None else list(_sendable(tree, least, held))
    heap = [(*_likeliest_first(node), node) for node in frontier]
    heapq.heapify(heap)
    chosen: list[DraftNode] = []
    while heap and len(chosen) < limit:
        _, _, node = heapq.heappop(heap)
        chosen.append(node)
        for child in node.children.values():
            if child.number is None and child.path_logprob >= least and child.key not in held:
                heapq.heappush(heap, (*_likeliest_first(child), child))
    return chosen


def has_unsent(tree: DraftTree, decision: Decision, held: Container[int] = ()) -> bool:
    """Return True if the root is sent and `choose_unsent` would return a node."""
    least = _min_logprob(decision)
    return tree.root.number is not None and next(_sendable(tree, least, held), None) is not None


def _sendable(tree: DraftTree, least: float, held: Container[int]) -> Iterator[DraftNode]:
    return (node for node in tree.frontier.values() if node.path_logprob >= least and node.key not in held)


def _min_logprob(decision: Decision) -> float:
    """Return the log probability below which a node is not worth a place now."""
    return math.log(decision.min_path_prob) if decision.min_path_prob else -math.inf


def _likeliest_first(node: DraftNode) -> tuple[float, int]:
    return -node.path_logprob, node.key

"""Where the tree grows: which nodes are drafted below and which are sent, both best-first by path probability.

A node sent later than its parent delays the text by that difference, if the text goes through it, and by nothing if it does not.
So the expected delay is least when at every moment the nodes of the greatest path probability go first, whatever their depth: beams
of one depth let combinations far in the future push out what is needed next. A node's probability rises as the root moves towards
it, so what is unlikely now waits rather than being lost.
"""

import heapq
import math
from collections.abc import Container, Iterator

from dsd_p2p.session.tree import DraftNode, DraftTree, path_logprob
from dsd_p2p.window.base import Decision


def choose_stems(tree: DraftTree, decision: Decision, last_position: int) -> list[DraftNode]:
    """Return the likeliest nodes before `last_position` that no drafter was asked to expand."""
    least = _min_logprob(decision)
    last_position = min(tree.root.position + decision.depth, last_position)
    stems = [node for node in tree.unexpanded.values() if node.path_logprob >= least and node.position < last_position]
    stems.sort(key=path_logprob, reverse=True)
    return stems[: decision.expand_nodes]


def choose_unsent(tree: DraftTree, decision: Decision, limit: int, held: Container[int] = ()) -> list[DraftNode]:
    """Return the `limit` likeliest unsent nodes, each after its parent; an unsent root comes first.

    held: keys of nodes that are not to be sent yet.
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
    """True when `choose_unsent` would find something below the sent root."""
    least = _min_logprob(decision)
    return tree.root.number is not None and next(_sendable(tree, least, held), None) is not None


def _sendable(tree: DraftTree, least: float, held: Container[int]) -> Iterator[DraftNode]:
    return (node for node in tree.frontier.values() if node.path_logprob >= least and node.key not in held)


def _min_logprob(decision: Decision) -> float:
    """The log probability below which a node is not worth a place now."""
    return math.log(decision.min_path_prob) if decision.min_path_prob else -math.inf


def _likeliest_first(node: DraftNode) -> tuple[float, int]:
    return -node.path_logprob, node.key

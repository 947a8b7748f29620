"""Holds the coordinator's draft tree, which grows from the last committed token."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from dsd_p2p.types import TokenId

path_logprob = attrgetter("path_logprob")
"""Key that sorts nodes by the log probability of their paths."""


@dataclass(slots=True, kw_only=True, eq=False)
class DraftNode:
    """One candidate token.

    key: identifies the node for the life of the session; drafters keep their caches by key.
    path_logprob: log probability of the path from the root to this node, by the drafter, corrected by sharpening.
    rank: place among its siblings by the drafter's probability, 0 for the likeliest. source: the proposing drafter.
    number: its number on the wire within the epoch; None until it is sent.
    is_expanded: a drafter has already been asked for its children.
    candidates: the drafter's answer, likeliest first, as (token, the drafter's own log probability).
    depth: distance from the root when it was drafted.
    """

    key: int
    token: TokenId
    position: int
    parent: "DraftNode | None"
    path_logprob: float
    rank: int = 0
    source: str = ""
    depth: int = 0
    number: int | None = None
    is_expanded: bool = False
    candidates: tuple[tuple[TokenId, float], ...] = ()
    children: dict[TokenId, "DraftNode"] = field(default_factory=dict)

    def subtree(self) -> Iterator["DraftNode"]:
        """Yield this node and all below it, parents first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


class DraftTree:
    """A draft tree: the root, which is committed, and the candidates below it.

    unsent: the nodes that no window carries, by key. unexpanded: those that no drafter was asked to expand, by key.
    frontier: the unsent nodes that may be sent next, by key: the root, and children of sent nodes.
    """

    def __init__(self, *, token: TokenId, position: int, key: int) -> None:
        self._next_key = key
        self._by_key: dict[int, DraftNode] = {}
        self.unsent: dict[int, DraftNode] = {}
        self.frontier: dict[int, DraftNode] = {}
        self.unexpanded: dict[int, DraftNode] = {}
        self.root = self._new_node(token, position, None, 0.0, 0, "")

    def __len__(self) -> int:
        """Return the number of nodes below the root."""
        return len(self._by_key) - 1

    def __repr__(self) -> str:
        number = "unsent" if self.root.number is None else f"node {self.root.number}"
        return f"tree of {len(self)} below {self.root.token}@{self.root.position} ({number}), {self.num_sent} sent"

    @property
    def num_sent(self) -> int:
        """Number of nodes that windows carry, the root included."""
        return len(self._by_key) - len(self.unsent)

    def get(self, key: int) -> DraftNode | None:
        """Return the node with this key, or None if it is no longer in the tree."""
        return self._by_key.get(key)

    def add(self, parent: DraftNode, token: TokenId, logprob: float, rank: int = 0, source: str = "") -> DraftNode:
        """Add a candidate below `parent` and return its node.

        If the node exists already, it takes the new rank and probability, and the paths below it change accordingly.
        """
        path_logprob = parent.path_logprob + min(logprob, 0.0)
        known = parent.children.get(token)
        if known is not None:
            known.rank = rank
            change = path_logprob - known.path_logprob
            for node in known.subtree():
                node.path_logprob += change
            return known
        node = self._new_node(token, parent.position + 1, parent, path_logprob, rank, source)
        node.depth = node.position - self.root.position
        parent.children[token] = node
        return node

    def send(self, node: DraftNode, number: int) -> None:
        """Mark the node as sent, under this number."""
        node.number = number
        self.unsent.pop(node.key, None)
        self.frontier.pop(node.key, None)
        for child in node.children.values():
            if child.number is None:
                self.frontier[child.key] = child

    def expand(self, node: DraftNode) -> None:
        """Mark the node as expanded: a drafter was asked for its children."""
        node.is_expanded = True
        self.unexpanded.pop(node.key, None)

    def forget_sent(self) -> None:
        """Mark all nodes as unsent, for a new epoch."""
        for node in self._by_key.values():
            node.number = None
        self.unsent = dict(self._by_key)
        self.frontier = {self.root.key: self.root}

    def commit(self, token: TokenId) -> DraftNode | None:
        """Make the root's child holding `token` the new root and drop everything else.

        Returns the new root if it was in the tree. Otherwise returns None, and the root is a new node without children.
        """
        old_root = self.root
        hit = old_root.children.get(token)
        if hit is None:
            self._by_key.clear()
            self.unsent.clear()
            self.frontier.clear()
            self.unexpanded.clear()
            self.root = self._new_node(token, old_root.position + 1, None, 0.0, 0, "")
            return None
        base_logprob = hit.path_logprob
        self._by_key = {}
        for node in hit.subtree():
            node.path_logprob -= base_logprob
            self._by_key[node.key] = node
        self.unsent = {key: node for key, node in self._by_key.items() if node.number is None}
        self.unexpanded = {key: node for key, node in self._by_key.items() if not node.is_expanded}
        hit.parent = None
        self.root = hit
        self.frontier = {
            key: node for key, node in self.unsent.items() if node.parent is None or node.parent.number is not None
        }
        return hit

    def shed(self, max_nodes: int) -> None:
        """Drop the unlikeliest leaves, unless sent or expanded, until at most `max_nodes` are below the root."""
        surplus = len(self) - max_nodes
        if surplus <= 0:
            return
        leaves = [
            node
            for node in self.unsent.values()
            if not node.is_expanded and not node.children and node.parent is not None
        ]
        leaves.sort(key=path_logprob)
        for node in leaves[:surplus]:
            assert node.parent is not None
            del node.parent.children[node.token]
            for index in (self._by_key, self.unsent, self.unexpanded):
                del index[node.key]
            self.frontier.pop(node.key, None)

    def nodes(self) -> Iterable[DraftNode]:
        """Return all nodes, the root included, parents before children."""
        return self._by_key.values()

    def _new_node(
        self, token: TokenId, position: int, parent: DraftNode | None, path_logprob: float, rank: int, source: str
    ) -> DraftNode:
        if not math.isfinite(path_logprob):
            path_logprob = -1e9
        node = DraftNode(
            key=self._next_key,
            token=token,
            position=position,
            parent=parent,
            path_logprob=path_logprob,
            rank=rank,
            source=source,
        )
        self._by_key[node.key] = self.unsent[node.key] = self.unexpanded[node.key] = node
        if parent is None or parent.number is not None:
            self.frontier[node.key] = node
        self._next_key += 1
        return node

"""The coordinator's draft tree under the last committed token."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dsd_p2p.types import TokenId


@dataclass(slots=True, kw_only=True, eq=False)
class DraftNode:
    """One candidate token.

    key: names the node for the life of the session; drafters keep their caches by it.
    path_logprob: the drafter's log probability of the path from the root to here.
    rank: place among its siblings by the drafter's probability, 0 the likeliest.
    number: its number on the wire within the epoch, None before it is sent.
    is_expanded: a drafter has already been asked for its children.
    """

    key: int
    token: TokenId
    position: int
    parent: "DraftNode | None"
    path_logprob: float
    rank: int = 0
    number: int | None = None
    is_expanded: bool = False
    children: dict[TokenId, "DraftNode"] = field(default_factory=dict)

    def subtree(self) -> Iterator["DraftNode"]:
        """Yield this node and all below it, parents first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


class DraftTree:
    """Committed root and the candidates below it."""

    def __init__(self, *, token: TokenId, position: int, key: int) -> None:
        self._next_key = key
        self._by_key: dict[int, DraftNode] = {}
        self.root = self._new_node(token, position, None, 0.0, 0)

    def __len__(self) -> int:
        """Return the number of nodes below the root."""
        return len(self._by_key) - 1

    def get(self, key: int) -> DraftNode | None:
        """Return the node of that key if it is still in the tree."""
        return self._by_key.get(key)

    def add(self, parent: DraftNode, token: TokenId, logprob: float, rank: int = 0) -> DraftNode:
        """Hang a candidate under `parent`; one that is there already is returned as it is."""
        known = parent.children.get(token)
        if known is not None:
            return known
        node = self._new_node(token, parent.position + 1, parent, parent.path_logprob + min(logprob, 0.0), rank)
        parent.children[token] = node
        return node

    def commit(self, token: TokenId) -> DraftNode | None:
        """Make the root's child holding `token` the new root and drop everything else.

        Returns the new root if it was in the tree, None on a miss: the root is then a new node without children.
        """
        old_root = self.root
        hit = old_root.children.get(token)
        if hit is None:
            self._by_key.clear()
            self.root = self._new_node(token, old_root.position + 1, None, 0.0, 0)
            return None
        base_logprob = hit.path_logprob
        self._by_key = {}
        for node in hit.subtree():
            node.path_logprob -= base_logprob
            self._by_key[node.key] = node
        hit.parent = None
        self.root = hit
        return hit

    def nodes(self) -> Iterable[DraftNode]:
        """All nodes, the root included, parents before children."""
        return self._by_key.values()

    def _new_node(
        self, token: TokenId, position: int, parent: DraftNode | None, path_logprob: float, rank: int
    ) -> DraftNode:
        if not math.isfinite(path_logprob):
            path_logprob = -1e9
        node = DraftNode(
            key=self._next_key, token=token, position=position, parent=parent, path_logprob=path_logprob, rank=rank
        )
        self._by_key[node.key] = node
        self._next_key += 1
        return node

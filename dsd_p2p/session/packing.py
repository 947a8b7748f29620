"""Converts draft nodes to the fields of a window (docs/protocol.md, rule 3: Nodes)."""

from collections.abc import Sequence

from dsd_p2p.session.tree import DraftNode
from dsd_p2p.types import TokenId
from dsd_p2p.wire.messages import BASE, MAX_DRAFT_TOP, DraftTop

_MAX_CENTINATS = 100_000


def pack_nodes(nodes: Sequence[DraftNode], first_node: int) -> tuple[list[TokenId], list[int], list[int]]:
    """Return the tokens, parents' numbers and positions of nodes that are numbered from `first_node` on.

    A root has no parent in the tree. Its parent on the wire is the node numbered before it, or the epoch's base.
    """
    root_parent = BASE if first_node == 0 else first_node - 1
    parents = [root_parent if node.parent is None else _number(node.parent) for node in nodes]
    return [node.token for node in nodes], parents, [node.position for node in nodes]


def draft_tops(nodes: Sequence[DraftNode]) -> tuple[DraftTop, ...]:
    """Return the drafter's likeliest candidates below each node that it was asked about."""
    return tuple(
        DraftTop(
            offset=offset,
            tokens=tuple(token for token, _ in node.candidates[:MAX_DRAFT_TOP]),
            centinats=tuple(_centinats(logprob) for _, logprob in node.candidates[:MAX_DRAFT_TOP]),
        )
        for offset, node in enumerate(nodes)
        if node.candidates
    )


def _centinats(logprob: float) -> int:
    return min(max(0, round(-100 * logprob)), _MAX_CENTINATS)


def _number(node: DraftNode) -> int:
    assert node.number is not None, "a node is sent after its parent"
    return node.number

"""The catalogue: named windows for sweeps to compare and for the learned policy to choose from."""

from collections.abc import Mapping
from types import MappingProxyType

from dsd_p2p.window.base import Decision
from dsd_p2p.window.static import PLAIN, SYNC_TREES, sync_chain, sync_tree, usual_tree

_SYNC_DEPTHS = (1, 2, 3, 4, 6, 8, 12)
_CONTINUOUS = ((1, 2, 3), (1, 2, 128), (2, 4, 6), (2, 4, 128), (2, 8, 6), (4, 8, 6), (4, 8, 128), (12, 16, 128))
"""(width, nodes per window, windows in flight)."""


CATALOGUE: Mapping[str, Decision] = MappingProxyType(
    {
        "plain": PLAIN,
        **{f"sync-{depth}": sync_chain(depth) for depth in _SYNC_DEPTHS},
        **{f"sync-tree-{nodes}": sync_tree(nodes, depth=depth) for nodes, depth in SYNC_TREES},
        **{
            f"continuous-{width}x{nodes}-{flight}": usual_tree(width, nodes, flight)
            for width, nodes, flight in _CONTINUOUS
        },
    }
)

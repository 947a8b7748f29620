"""Decentralized speculative decoding: peers share a model too large for any of them and guess while messages travel.

From Python, start with `Swarm` or `SyncSwarm` (`dsd_p2p.api`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd_p2p.api import Swarm as Swarm
    from dsd_p2p.api import SyncSwarm as SyncSwarm
    from dsd_p2p.api import Token as Token

__all__ = ["Swarm", "SyncSwarm", "Token"]


def __getattr__(name: str) -> Any:
    """Import `dsd_p2p.api` on first use: the simulator and the pure core need neither torch nor the network."""
    if name in __all__:
        return getattr(import_module("dsd_p2p.api"), name)
    raise AttributeError(name)

"""Decentralized speculative decoding: peers share a model too large for any of them, and guess while messages travel.

`Swarm` and `SyncSwarm` (`dsd_p2p.api`) are the way in from Python.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd_p2p.api import Swarm as Swarm
    from dsd_p2p.api import SyncSwarm as SyncSwarm
    from dsd_p2p.api import Token as Token

__all__ = ["Swarm", "SyncSwarm", "Token"]


def __getattr__(name: str) -> Any:
    """Import the interface when it is used: the simulator and the pure core need no torch and no network."""
    if name in __all__:
        return getattr(import_module("dsd_p2p.api"), name)
    raise AttributeError(name)

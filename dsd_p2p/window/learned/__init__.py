"""Adaptive window control: a small network, trained in the simulator, that rates every window of the catalogue.

After arXiv:2511.21669 (WC-DNN): its inputs (queue, acceptance, round trip, time per token, previous window) with draft confidence
and the route's shape beside them; two residual blocks; where it has one output, the window length, this one rates every window
that the engine can choose.
"""

from dsd_p2p.window.learned.network import Network
from dsd_p2p.window.learned.policy import LearnedPolicy

__all__ = ["LearnedPolicy", "Network"]

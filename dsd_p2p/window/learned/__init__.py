"""Adaptive window control: a small network, trained in the simulator, that rates every window of the catalogue.

It follows WC-DNN of arXiv:2511.21669, with two residual blocks. The inputs are WC-DNN's (queue, acceptance, round trip,
time per token, previous window) plus draft confidence and the route's shape. WC-DNN's one output is the window length;
this network rates every window that the engine can choose.
"""

from dsd_p2p.window.learned.network import Network
from dsd_p2p.window.learned.policy import LearnedPolicy

__all__ = ["LearnedPolicy", "Network"]

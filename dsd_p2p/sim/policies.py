"""The window policies that a scenario may name: the live ones."""

from collections.abc import Callable

from dsd_p2p.sim.scenario import Speculation
from dsd_p2p.window.analytic import AnalyticPolicy
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain
from dsd_p2p.window.threshold import ThresholdPolicy


def policy_maker(speculation: Speculation) -> Callable[[], WindowPolicy]:
    """Return what makes the policy of one request."""
    if speculation.mode == "fused":
        return lambda: StaticPolicy(PLAIN)
    match speculation.window:
        case "plain":
            return lambda: StaticPolicy(PLAIN)
        case "static":
            decision = sync_chain(speculation.depth)
        case "tree":
            decision = continuous_tree(
                depth=96,
                width=speculation.width,
                window_nodes=speculation.window_nodes,
                max_in_flight=speculation.in_flight,
                min_path_prob=0.001 if speculation.width > 4 else 0.02,
            )
        case "threshold":
            return ThresholdPolicy
        case _:
            return AnalyticPolicy
    return lambda: StaticPolicy(decision)

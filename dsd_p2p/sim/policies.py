"""Makes the window policies that a scenario may name; they are the live ones."""

from collections.abc import Callable
from functools import partial

from dsd_p2p.sim.scenario import Speculation
from dsd_p2p.window.base import Mode, WindowPolicy
from dsd_p2p.window.named import adaptive_policy
from dsd_p2p.window.static import PLAIN, StaticPolicy, sync_chain, usual_tree
from dsd_p2p.window.threshold import ThresholdPolicy


def policy_maker(speculation: Speculation) -> Callable[[], WindowPolicy]:
    """Return a function that makes the policy of one request.

    That function raises ConfigError if the learned policy's weights cannot be read.
    """
    if speculation.mode == "fused":
        return lambda: StaticPolicy(PLAIN)
    modes = frozenset(map(Mode, speculation.modes))
    match speculation.policy:
        case "plain":
            decision = PLAIN
        case "static":
            decision = sync_chain(speculation.depth)
        case "tree":
            decision = usual_tree(speculation.width, speculation.window_nodes, speculation.in_flight)
        case "threshold":
            return ThresholdPolicy
        case adaptive:
            return partial(adaptive_policy, adaptive, modes)
    return lambda: StaticPolicy(decision)

"""The window policies that a scenario may name: the live ones."""

from collections.abc import Callable

from dsd_p2p.errors import ConfigError
from dsd_p2p.sim.scenario import Speculation
from dsd_p2p.window.analytic import AnalyticPolicy
from dsd_p2p.window.base import Mode, WindowPolicy
from dsd_p2p.window.static import PLAIN, StaticPolicy, sync_chain, usual_tree
from dsd_p2p.window.threshold import ThresholdPolicy
from dsd_p2p.window.wcdnn import AwcPolicy, Network


def policy_maker(speculation: Speculation, network: Network | None = None) -> Callable[[], WindowPolicy]:
    """Return what makes the policy of one request. network: of window "awc".

    Raises:
        ConfigError: "awc" without a network.
    """
    if speculation.mode == "fused":
        return lambda: StaticPolicy(PLAIN)
    modes = frozenset(map(Mode, speculation.modes))
    match speculation.window:
        case "plain":
            decision = PLAIN
        case "static":
            decision = sync_chain(speculation.depth)
        case "tree":
            decision = usual_tree(speculation.width, speculation.window_nodes, speculation.in_flight)
        case "threshold":
            return ThresholdPolicy
        case "analytic":
            return lambda: AnalyticPolicy(modes)
        case _ if network is not None:
            return lambda: AwcPolicy(network, modes)
        case _:
            raise ConfigError("window awc needs the weights of scripts/train_wcdnn")
    return lambda: StaticPolicy(decision)

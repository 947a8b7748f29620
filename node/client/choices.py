"""Turns the names in flags into policies and thresholds."""

from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import Relaxation
from dsd_p2p.window.base import Mode, WindowPolicy
from dsd_p2p.window.named import adaptive_policy
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain
from node.config import GenerateConfig
from node.config.relaxation import bundled_thresholds, read_thresholds

_SYNC_DEPTH = 8
_DEPTH, _WIDTH, _WINDOW_NODES, _IN_FLIGHT = 96, 2, 8, 6
# The fastest setting measured with all processes sharing two cores (docs/benchmarks.md).


def make_policy(config: GenerateConfig, mode: Mode | None = None) -> WindowPolicy:
    """Return the policy that `--mode` (or `mode`), `--policy` and the options of the static policy ask for.

    Raises:
        ConfigError: the policy does not exist.
    """
    mode = mode or config.mode
    if mode is Mode.PLAIN:
        return StaticPolicy(PLAIN)
    is_given = any((config.depth, config.width, config.window_nodes, config.in_flight))
    if config.policy != "static" and not is_given:
        return adaptive_policy(config.policy, frozenset({mode}))
    if mode is Mode.SYNC:
        return StaticPolicy(sync_chain(config.depth or _SYNC_DEPTH))
    return StaticPolicy(
        continuous_tree(
            depth=config.depth or _DEPTH,
            width=config.width or _WIDTH,
            window_nodes=config.window_nodes or _WINDOW_NODES,
            max_in_flight=config.in_flight or _IN_FLIGHT,
        )
    )


def make_relaxation(config: GenerateConfig) -> Relaxation | None:
    """Return the thresholds that `--verify` asks for; None means exact mode.

    Raises:
        ConfigError: the mode does not exist, or the thresholds cannot be read.
    """
    match config.verify:
        case "exact":
            return None
        case "relaxed":
            file = Path(config.relaxation) if config.relaxation else bundled_thresholds()
            changes = {"tau": config.tau, "budget": config.budget}
            given = {name: value for name, value in changes.items() if value is not None}
            return msgspec.structs.replace(read_thresholds(file).relaxation, **given)
        case other:
            raise ConfigError(f"--verify {other!r}: choose exact or relaxed")

"""The policies that adapt, by name."""

from dsd_p2p.errors import ConfigError
from dsd_p2p.window.analytic import AnalyticPolicy
from dsd_p2p.window.base import Mode, WindowPolicy
from dsd_p2p.window.learned.bundled import learned_policy

ALL_MODES = frozenset({Mode.SYNC, Mode.CONTINUOUS})


def adaptive_policy(name: str, modes: frozenset[Mode] = ALL_MODES) -> WindowPolicy:
    """Return a policy for one request. modes: what it may choose from besides plain.

    Raises:
        ConfigError: there is no such policy.
    """
    match name:
        case "analytic":
            return AnalyticPolicy(modes)
        case "learned":
            return learned_policy(modes)
        case other:
            raise ConfigError(f"policy {other!r}: choose learned or analytic")

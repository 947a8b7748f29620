"""Makes the adaptive policies by name."""

from dsd_p2p.errors import ConfigError
from dsd_p2p.window.analytic import AnalyticPolicy
from dsd_p2p.window.base import Mode, WindowPolicy
from dsd_p2p.window.learned.bundled import learned_policy

ALL_MODES = frozenset({Mode.SYNC, Mode.CONTINUOUS})


def adaptive_policy(name: str, modes: frozenset[Mode] = ALL_MODES) -> WindowPolicy:
    """Return a policy for one request. modes: the modes that it may choose besides plain.

    Raises:
        ConfigError: no policy has this name.
    """
    match name:
        case "analytic":
            return AnalyticPolicy(modes)
        case "learned":
            return learned_policy(modes)
        case other:
            raise ConfigError(f"policy {other!r}: choose learned or analytic")

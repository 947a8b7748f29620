"""The learned policy with the bundled weights (made by `scripts/train_policy`), the default policy everywhere."""

from functools import cache
from importlib.resources import files

from dsd_p2p.errors import ConfigError
from dsd_p2p.window.base import Mode
from dsd_p2p.window.learned import LearnedPolicy, Network


@cache
def bundled_network() -> Network:
    """Return the learned policy's network.

    Raises:
        ConfigError: its weights are missing or from another version.
    """
    file = files("dsd_p2p").joinpath("data/policy.npz")
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}; train it with scripts/train_policy") from exc
    return Network.from_bytes(data)


def learned_policy(modes: frozenset[Mode] = frozenset({Mode.SYNC, Mode.CONTINUOUS})) -> LearnedPolicy:
    """Return a policy for one request. modes: the modes that it may choose besides plain."""
    return LearnedPolicy(bundled_network(), modes)

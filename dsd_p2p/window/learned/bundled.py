"""The learned window policy with the weights that come along (`scripts/train_policy`): the default of every way in."""

from functools import cache
from importlib.resources import files

from dsd_p2p.errors import ConfigError
from dsd_p2p.window.base import Mode
from dsd_p2p.window.learned import LearnedPolicy, Network


@cache
def bundled_network() -> Network:
    """Return the network of the learned policy.

    Raises:
        ConfigError: its weights are missing or of another version.
    """
    file = files("dsd_p2p").joinpath("data/policy.npz")
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}; train it with scripts/train_policy") from exc
    return Network.from_bytes(data)


def learned_policy(modes: frozenset[Mode] = frozenset({Mode.SYNC, Mode.CONTINUOUS})) -> LearnedPolicy:
    """Return the policy of one request. modes: it may choose from besides plain."""
    return LearnedPolicy(bundled_network(), modes)

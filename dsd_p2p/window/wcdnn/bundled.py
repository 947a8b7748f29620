"""The learned window policy with the weights that come along (`scripts/train_wcdnn`): the default of every way in."""

from functools import cache
from importlib.resources import files

from dsd_p2p.errors import ConfigError
from dsd_p2p.window.base import Mode
from dsd_p2p.window.wcdnn import AwcPolicy, Network


@cache
def bundled_network() -> Network:
    """Return the network of window "awc".

    Raises:
        ConfigError: its weights are missing or of another version.
    """
    file = files("dsd_p2p").joinpath("data/wcdnn.npz")
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}; train it with scripts/train_wcdnn") from exc
    return Network.from_bytes(data)


def learned_policy(modes: frozenset[Mode] = frozenset({Mode.SYNC, Mode.CONTINUOUS})) -> AwcPolicy:
    """Return the policy of one request. modes: it may choose from besides plain."""
    return AwcPolicy(bundled_network(), modes)

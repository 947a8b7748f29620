"""The window policy's weights that the project brings along."""

from functools import cache
from importlib.resources import files

from dsd_p2p.errors import ConfigError
from dsd_p2p.window.wcdnn import Network


@cache
def bundled_network() -> Network:
    """Return the network of window "awc".

    Raises:
        ConfigError: its weights are missing or of another version.
    """
    file = files("node").joinpath("data/wcdnn.npz")
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}; train it with scripts/train_wcdnn") from exc
    return Network.from_bytes(data)

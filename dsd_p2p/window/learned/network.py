"""The network in numpy: an input layer, two residual SiLU blocks, and an output layer."""

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import ConfigError
from dsd_p2p.window.catalogue import CATALOGUE
from dsd_p2p.window.learned.features import NAMES

VERSION = 3
NUM_BLOCKS = 2
Array = NDArray[np.float32]


class Network:
    """The network that rates the windows of the catalogue. weights: by name, as `scripts/train_policy` writes them.

    Raises:
        ConfigError: the weights were made for another version, other features or another catalogue.
    """

    def __init__(self, weights: Mapping[str, NDArray[np.generic]]) -> None:
        arms, names = list(map(str, weights["arms"])), list(map(str, weights["features"]))
        if int(weights["version"]) != VERSION or arms != list(CATALOGUE) or names != list(NAMES):
            raise ConfigError(
                "policy weights: made for another version, other features or another catalogue; "
                "train them with scripts/train_policy"
            )
        self._mean, self._scale = _array(weights["mean"]), _array(weights["scale"])
        self._first = _array(weights["first.weight"]).T.copy(), _array(weights["first.bias"])
        self._blocks = [
            tuple(
                (
                    _array(weights[f"blocks.{block}.{layer}.weight"]).T.copy(),
                    _array(weights[f"blocks.{block}.{layer}.bias"]),
                )
                for layer in ("inner", "outer")
            )
            for block in range(NUM_BLOCKS)
        ]
        self._last = _array(weights["last.weight"]).T.copy(), _array(weights["last.bias"])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Network":
        """Return the network from the bytes of an `.npz` file.

        Raises:
            ConfigError: the bytes are not such a file, or are from another version.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as weights:
                return cls({name: weights[name] for name in weights.files})
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as exc:
            raise ConfigError(f"policy weights: {exc}; train them with scripts/train_policy") from exc

    def rate(self, features: Array) -> Array:
        """Return the logarithm of each catalogue window's speed over plain decoding's, float32 `[arms]`."""
        hidden = _silu(_linear((features - self._mean) / self._scale, self._first))
        for inner, outer in self._blocks:
            hidden = hidden + _linear(_silu(_linear(hidden, inner)), outer)
        return _linear(_silu(hidden), self._last)


def _linear(values: Array, layer: tuple[Array, Array]) -> Array:
    weight, bias = layer
    result: Array = values @ weight + bias
    return result


def _silu(values: Array) -> Array:
    # x * sigmoid(x), written with tanh because it does not overflow.
    result: Array = values * (1 + np.tanh(values / 2)) / 2
    return result


def _array(values: NDArray[np.generic]) -> Array:
    return np.ascontiguousarray(values, np.float32)

"""Settles the format of a model's weights where the flags leave it to the model."""

from typing import TypeVar

import msgspec

from dsd_p2p.models.formats import AUTO, choose_format
from dsd_p2p.models.source import ModelSource
from node.config import CreateConfig, ModelFlags
from node.config.machine import available_bytes

Config = TypeVar("Config", bound=ModelFlags | CreateConfig)


def with_format(config: Config, source: ModelSource) -> Config:
    """Return the settings with the weights format that they name or, where they leave it to us, that fits the model.

    Raises:
        ModelError: the model's files cannot be read.
    """
    if config.dtype != AUTO:
        return config
    return msgspec.structs.replace(config, dtype=choose_format(source, config.device, available_bytes()))

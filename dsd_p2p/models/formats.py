"""Chooses the format of a model's weights in memory, where the user leaves it to us."""

import json

import torch

from dsd_p2p.models.architecture import read_model_config
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.device import device_type
from dsd_p2p.models.loader import num_weights
from dsd_p2p.models.source import ModelSource
from dsd_p2p.types import INT8, STORED

AUTO = "auto"

REPORT = "quantize.json"
"""The file in which `dsd quantize` says how near a model's int8 form is to its floats."""

MIN_AGREEMENT = 0.955
"""The least share of positions at which another format must choose the floats' token, to be chosen unasked."""

LEAN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""The families whose lean layers the tests compare with transformers' own."""

_MEMORY_SHARE = 0.5
"""Share of the free memory that a model in int8 may take."""


def choose_format(source: ModelSource, device: str, free_bytes: int) -> str:
    """Return the weights format for a model on a device. free_bytes: memory that is free on this machine.

    int8 is fastest, so a model that was judged good in int8 runs in it where it fits into the memory. Another quantised
    checkpoint runs as it is stored. Models in floats run in float32, and so does everything on a GPU.

    Raises:
        ModelError: the model's files cannot be read.
    """
    is_lean = (
        device_type(device) == "cpu"
        and "fbgemm" in torch.backends.quantized.supported_engines
        and read_model_config(source.folder).model_type in LEAN_FAMILIES
    )
    if not is_lean:
        return "float32"
    # One byte for each weight.
    if _agreement(source) >= MIN_AGREEMENT and num_weights(source) <= _MEMORY_SHARE * free_bytes:
        return INT8
    return STORED if source.weights.is_quantised else "float32"


def _agreement(source: ModelSource) -> float:
    """Return how often the int8 form chose the floats' token when it was judged; 0 if it never was."""
    if source.name in CATALOG:
        return CATALOG[source.name].int8_agreement
    try:
        return float(json.loads((source.folder / REPORT).read_text())["int8"]["agreement"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0

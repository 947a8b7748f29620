"""Chooses the format of a model's weights in memory, where the user leaves it to us."""

import json
from pathlib import Path

import torch

from dsd_p2p.models.architecture import read_model_config
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

    A quantised checkpoint runs in int8 where that fits into the memory, and in its own 4-bit numbers where it does not. A
    model that `dsd quantize` found good in int8 runs in int8. Others run in float32, and so does everything on a GPU.

    Raises:
        ModelError: the model's files cannot be read.
    """
    is_lean = (
        torch.device(device).type == "cpu"
        and "fbgemm" in torch.backends.quantized.supported_engines
        and read_model_config(source.folder).model_type in LEAN_FAMILIES
    )
    if not is_lean:
        return "float32"
    if source.weights.is_quantised:
        # One byte for each weight.
        return INT8 if num_weights(source) <= _MEMORY_SHARE * free_bytes else STORED
    return INT8 if _agreement(source.folder) >= MIN_AGREEMENT else "float32"


def _agreement(folder: Path) -> float:
    try:
        return float(json.loads((folder / REPORT).read_text())["int8"]["agreement"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0

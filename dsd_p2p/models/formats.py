"""Chooses the format of a model's weights in memory, where the user leaves it to us."""

import json
from pathlib import Path

import torch

from dsd_p2p.models.architecture import read_model_config
from dsd_p2p.models.source import ModelSource
from dsd_p2p.types import INT8, STORED

AUTO = "auto"

REPORT = "quantize.json"
"""The file in which `dsd quantize` says how near a model's int8 form is to its floats."""

MIN_AGREEMENT = 0.955
"""The least share of positions at which another format must choose the floats' token, to be chosen unasked."""

LEAN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""The families whose lean layers the tests compare with transformers' own."""

_JUDGED = ("self_attn.o_proj", "mlp.up_proj")


def choose_format(source: ModelSource, device: str) -> str:
    """Return the weights format for a model on a device.

    A checkpoint in 4-bit numbers stays in them: that is the smallest form, and the nearest to its floats after them. A
    model that `dsd quantize` found good in int8 runs in int8. Others run in float32, and so does everything on a GPU.

    Raises:
        ModelError: the model's files cannot be read.
    """
    is_lean = (
        torch.device(device).type == "cpu"
        and "fbgemm" in torch.backends.quantized.supported_engines
        and read_model_config(source.folder).model_type in LEAN_FAMILIES
    )
    if is_lean and _has_4_bits(source):
        return STORED
    return INT8 if is_lean and _agreement(source.folder) >= MIN_AGREEMENT else "float32"


def _has_4_bits(source: ModelSource) -> bool:
    names = set(source.weights.names)
    judged = [name for name in (f"model.layers.0.{part}.weight" for part in _JUDGED) if name in names]
    return bool(judged) and all(source.weights.has_groups(name) for name in judged)


def _agreement(folder: Path) -> float:
    try:
        return float(json.loads((folder / REPORT).read_text())["int8"]["agreement"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0

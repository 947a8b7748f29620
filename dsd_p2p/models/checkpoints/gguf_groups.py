"""Takes the 4-bit numbers, scales and offsets out of the blocks of a GGUF file.

The layouts are those of ggml (https://github.com/ggml-org/ggml, `ggml-common.h` and `ggml-quants.c`).
"""

from collections.abc import Callable

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_p2p.models.checkpoints.base import Groups

_SIZE = 32
"""Columns that share a scale, in all formats below."""

Blocks = NDArray[np.uint8]


def groups_of(kind: int, rows: Blocks) -> Groups | None:
    """Return the groups of a tensor, or None if its format has no 4-bit numbers. rows: `[out, bytes of a row]`."""
    take = _TAKE.get(gguf.GGMLQuantizationType(kind))
    if take is None or rows.ndim != 2:
        return None
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    numbers, scales, offsets = take(rows.reshape(-1, block_bytes))
    return Groups(
        numbers=torch.from_numpy(numbers.reshape(len(rows), -1)),
        scales=_by_row(scales, len(rows)),
        offsets=_by_row(offsets, len(rows)),
        size=_SIZE,
    )


def _by_row(values: NDArray[np.float32], num_rows: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(num_rows, -1))


def _halves(blocks: Blocks, start: int) -> NDArray[np.float32]:
    """Return a float16 of each block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Blocks) -> Blocks:
    """Return the low and then the high four bits of each run of bytes, `[n, bytes]` to `[n, 2 * bytes]`."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


_Taken = tuple[Blocks, NDArray[np.float32], NDArray[np.float32]]


def _q4_0(blocks: Blocks) -> _Taken:
    scales = _halves(blocks, 0)
    return _nibbles(blocks[:, 2:]), scales, -8 * scales


def _q4_1(blocks: Blocks) -> _Taken:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q4_k(blocks: Blocks) -> _Taken:
    """Eight groups a block, whose scales and offsets are 6-bit numbers times a float16 each."""
    scale, offset, packed = _halves(blocks, 0), _halves(blocks, 2), blocks[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    offsets = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    numbers = _nibbles(blocks[:, 16:].reshape(-1, _SIZE))
    return numbers, scale * scales, -offset * offsets


_TAKE: dict[gguf.GGMLQuantizationType, Callable[[Blocks], _Taken]] = {
    gguf.GGMLQuantizationType.Q4_0: _q4_0,
    gguf.GGMLQuantizationType.Q4_1: _q4_1,
    gguf.GGMLQuantizationType.Q4_K: _q4_k,
}

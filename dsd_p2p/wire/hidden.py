"""Packs hidden states for a link into half or a quarter of the bytes.

Packing rounds, which can change the text, so a route uses the smaller formats only if the user asks for them.
`model`: the model's own format, without loss. `bf16`: bfloat16, rounded to nearest, for float32 models. `int8`: groups
of 32 values, each a float16 scale and 32 signed bytes. The scales of a row follow its values.
"""

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.types import ComputeFormat, HiddenFormat

GROUP = 32


def packed_row_bytes(row_bytes: int, compute: ComputeFormat, hidden_format: HiddenFormat) -> int:
    """Return the size in bytes of one node's hidden state on the link.

    row_bytes: its size in the model's own format.

    Raises:
        ConfigError: the model cannot use the format.
    """
    hidden_size = row_bytes // compute.value_bytes
    match hidden_format:
        case HiddenFormat.MODEL:
            return row_bytes
        case HiddenFormat.BF16:
            if compute is not ComputeFormat.FLOAT32:
                raise ConfigError(
                    f"hidden format bf16 is for float32 models, this one computes in {compute}: use model or int8"
                )
            return 2 * hidden_size
        case HiddenFormat.INT8:
            if hidden_size % GROUP:
                raise ConfigError(f"hidden format int8 needs a hidden size divisible by {GROUP}, not {hidden_size}")
            return hidden_size + 2 * hidden_size // GROUP


def pack(data: bytes, row_bytes: int, compute: ComputeFormat, hidden_format: HiddenFormat) -> bytes:
    """Return hidden states `[n, H]`, given in the model's own format, in the link's format."""
    if hidden_format is HiddenFormat.MODEL:
        return data
    values = to_float32(data, compute).reshape(len(data) // row_bytes, -1)
    if hidden_format is HiddenFormat.BF16:
        return _round_to_bfloat16(values).tobytes()
    groups = values.reshape(len(values), -1, GROUP)
    scales = (np.abs(groups).max(axis=2) / 127).astype(np.float16)
    # Divide by the scale as the receiver will read it, so that its rounding does not add a second error.
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)[:, :, None]
    rounded = np.clip(np.rint(groups / divisors), -127, 127).astype(np.int8).reshape(values.shape)
    return b"".join(row.tobytes() + scale.tobytes() for row, scale in zip(rounded, scales, strict=True))


def unpack(data: bytes, row_bytes: int, compute: ComputeFormat, hidden_format: HiddenFormat) -> bytes:
    """Return packed hidden states in the model's own format, equal to the input of `pack` up to rounding.

    Raises:
        RemoteProtocolError: a scale is not finite.
    """
    if hidden_format is HiddenFormat.MODEL:
        return data
    if hidden_format is HiddenFormat.BF16:
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).tobytes()
    hidden_size = row_bytes // compute.value_bytes
    rows = np.frombuffer(data, np.uint8).reshape(-1, hidden_size + 2 * hidden_size // GROUP)
    values = rows[:, :hidden_size].view(np.int8).reshape(len(rows), -1, GROUP)
    scales = np.ascontiguousarray(rows[:, hidden_size:]).view("<f2").astype(np.float32)
    if not np.isfinite(scales).all():
        raise RemoteProtocolError("hidden state scales", "NaN or infinity", "finite values")
    return from_float32((values * scales[:, :, None]).astype(np.float32), compute)


def _round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; infinities and NaN keep their upper half."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isfinite(values), rounded, bits >> 16).astype(np.uint16)


def to_float32(data: bytes, compute: ComputeFormat) -> NDArray[np.float32]:
    """Return hidden states in the model's own format as a flat float32 array."""
    match compute:
        case ComputeFormat.FLOAT32:
            return np.frombuffer(data, "<f4")
        case ComputeFormat.BFLOAT16:
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case ComputeFormat.FLOAT16:
            return np.frombuffer(data, "<f2").astype(np.float32)


def from_float32(values: NDArray[np.float32], compute: ComputeFormat) -> bytes:
    """Return a float32 array as hidden states in the model's own format."""
    match compute:
        case ComputeFormat.FLOAT32:
            return values.tobytes()
        case ComputeFormat.BFLOAT16:
            return _round_to_bfloat16(values).tobytes()
        case ComputeFormat.FLOAT16:
            return values.astype(np.float16).tobytes()

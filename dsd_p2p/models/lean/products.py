"""Multiplies rows with a weight matrix: in int8, in int8 with a second row for the rest, or in float32 to check the layers.

All take rows that are divided by their largest magnitude. The int8 products round with a fixed scale, so a row's result
has the same bits whatever rows are in the call.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_FULL_RANGE, _REDUCED_RANGE = 127, 63
"""Steps from zero to the largest magnitude. Without VNNI, fbgemm's products of two full 8-bit numbers overflow."""


class FloatProduct(nn.Module):
    """A product in float32. weight: `[out, in]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.num_bytes = weight.numel() * weight.element_size()

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]` to `[n, out]`."""
        return nn.functional.linear(rows, self.weight)


class Int8Product(nn.Module):
    """A product with int8 weights, one scale for each output channel. weight: float32 `[out, in]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = _packed(weight)
        self.steps = full_range()
        # One byte for each weight; a double and an integer for each row.
        self.num_bytes = weight.numel() + 16 * len(weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]`, between -1 and 1, to `[n, out]`."""
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows, 1.0 / self.steps, self.steps + 1, self.packed
        )
        return product


class Int8TwiceProduct(Int8Product):
    """The same with activations of twice the bits: what rounding leaves of a row goes along as a second row."""

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]`, between -1 and 1, to `[n, out]`."""
        num_rows = rows.size(0)
        scaled = rows * self.steps
        rounded = scaled.round()
        both: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            torch.cat([rounded / self.steps, scaled.sub_(rounded)]), 1.0 / self.steps, self.steps + 1, self.packed
        )
        return both[:num_rows].add_(both[num_rows:], alpha=1.0 / self.steps)


def num_bytes_of(product: nn.Module) -> int:
    """Return the size of a product's weights."""
    assert isinstance(product, FloatProduct | Int8Product)
    return product.num_bytes


MakeProduct = Callable[[Tensor], nn.Module]


def full_range() -> int:
    """Return the steps between zero and the largest magnitude of a row on this CPU."""
    check = getattr(torch.cpu, "_is_vnni_supported", None)
    return _FULL_RANGE if check is not None and check() else _REDUCED_RANGE


def _packed(weight: Tensor) -> Any:
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
    rounded = (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8).contiguous()
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        # torch deprecates its quantized tensors but offers no other int8 kernels for the CPU.
        warnings.simplefilter("ignore")
        quantized = torch._make_per_channel_quantized_tensor(rounded, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)

"""Runs linear layers on a CPU with weights in oneDNN's memory order, which is faster for the few rows of a window.

For two or three float32 rows torch's kernel reads the weights once per row; for a few more rows it reads them in a slow
order. With the packed weights a row's result has the same bits whatever other rows are in the call, in bfloat16 too.
Only the attention still depends on the size of a window.
"""

from typing import Any

import torch
from torch import nn

from dsd_p2p.models.device import device_type
from dsd_p2p.models.linear import swap_linear_layers

_FEWEST_ROWS = 4
"""Fewer rows are padded to this number: that is faster and uses the same kernel as larger numbers."""

_EXPECTED_ROWS = 8
"""A hint for oneDNN, which chooses the same order for any small number."""


class PackedLinear(nn.Module):
    """A linear layer that takes and returns the dtype of its weights.

    weight: `[out, in]`, float32 or bfloat16 on the CPU. bias: `[out]` or None.
    num_bytes: the size of weight and bias.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
        self._bias = bias
        self.num_bytes = sum(each.numel() * each.element_size() for each in (weight, bias) if each is not None)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its own order, for the few families that look at it (HunYuan's router)."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `[..., n, in]` to `[..., n, out]`."""
        num_rows = inputs.shape[-2]
        if num_rows < _FEWEST_ROWS:
            inputs = nn.functional.pad(inputs, (0, 0, 0, _FEWEST_ROWS - num_rows))
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
        return output[..., :num_rows, :]


def can_pack(dtype: torch.dtype, device: str) -> bool:
    """Return whether torch and the CPU have the kernels for `dtype` on `device`."""
    has_kernels = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if device_type(device) != "cpu" or not has_kernels:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def pack_linear_layers(model: Any) -> None:
    """Replace the linear layers of a model, including the LM head, with a `PackedLinear` that computes the same bits."""
    swap_linear_layers(model, PackedLinear, with_conv1d=False)
